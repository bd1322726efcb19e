"""Character banks on disk: round trips, folders, and what is refused."""

import dataclasses
import json
import pickle

import folder_paths
import pytest
import torch
from damage import Malice
from safetensors import safe_open
from safetensors.torch import save_file
from test_story_sampler import ONE, TWO, run_of, same_bank, tools, two  # noqa: F401
from tiny_unets import one_thread  # noqa: F401

from consistent_video.loaders import character_bank
from consistent_video.loaders.character_bank import FORMAT, load_bank, save_bank
from consistent_video.patches.character_bank import CharacterBank, Evaluation, Origin, Slot
from consistent_video.patches.token_sharing import Layer, Sharing

SHARING = Sharing(rate_32=0.3, rate_64=0.7, seed=2**64 - 1, count="random", unit="fractions")
ORIGIN = Origin("model", (14.614643096923828, 2.5, 0.029167, 0.0), 96, 64, SHARING)


def bank_of(*names: str, dtype: torch.dtype = torch.float32) -> CharacterBank:
    """A bank with seeded tokens; also a slot without any."""
    generator = torch.Generator().manual_seed(1)
    slots = [
        Slot(Evaluation(kind, kind, step, step % 2), Layer("output", block, 3))
        for kind in (0, 1)
        for step in (1, 12)
        for block in (0, 11)
    ]
    characters = {
        name: {slot: torch.randn(number, 6, generator=generator).to(dtype) for number, slot in enumerate(slots)}
        for name in names
    }
    return CharacterBank(ORIGIN, characters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_bank_comes_back_bit_for_bit(tmp_path, dtype):
    bank = bank_of("Ann", "main character", "J\u00e9r\u00f4me / 2.0", dtype=dtype)
    save_bank(bank, tmp_path / "bank.safetensors")
    back = load_bank(tmp_path / "bank.safetensors")
    assert list(back.characters) == list(bank.characters)
    assert same_bank(back, bank) and back.size == bank.size
    assert {tensor.dtype for tokens in back.characters.values() for tensor in tokens.values()} == {dtype}
    assert back.origin == ORIGIN
    back.check_origin(ORIGIN)


def test_a_bank_from_a_file_can_be_joined_and_saved_again(tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    save_bank(bank_of("Ann"), first)
    joined = load_bank(first).joined(bank_of("Ben", dtype=torch.float16).characters)
    save_bank(joined, second)
    assert same_bank(load_bank(second), joined)
    assert same_bank(load_bank(first), bank_of("Ann"))


def test_a_story_goes_on_from_a_file(tmp_path, tools, two):  # noqa: F811
    samples, bank = two
    save_bank(bank, tmp_path / "bank.safetensors")
    back = load_bank(tmp_path / "bank.safetensors")
    assert same_bank(back, bank)
    again, same = run_of(tools, TWO).draw(back, [3, 6])
    assert torch.equal(again, samples[[3, 6]])
    assert same_bank(same, bank)


def test_a_bank_in_half_precision_reads_as_it_was_saved(tmp_path, tools):  # noqa: F811
    _, bank = run_of(tools, ONE).draw()
    halves = {name: {slot: kept.half() for slot, kept in tokens.items()} for name, tokens in bank.characters.items()}
    half = CharacterBank(bank.origin, halves)
    save_bank(half, tmp_path / "bank.safetensors")
    again = run_of(tools, ONE).draw(load_bank(tmp_path / "bank.safetensors"), [2])[0]
    assert torch.equal(again, run_of(tools, ONE).draw(half, [2])[0])


@pytest.mark.parametrize("characters", [{}, {"Ann": {}}], ids=["nobody", "nothing"])
def test_an_empty_bank_is_not_saved(tmp_path, characters):
    """As of a story without characters, or of a run in which no layer shares."""
    with pytest.raises(ValueError, match="The character bank is empty. Draw a story with reference panels first"):
        save_bank(CharacterBank(ORIGIN, characters), tmp_path / "bank.safetensors")
    assert not list(tmp_path.iterdir())


# Damage


@pytest.fixture
def file(tmp_path):
    """A saved bank."""
    path = tmp_path / "bank.safetensors"
    save_bank(bank_of("Ann", "Ben"), path)
    return path


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-10], lambda data: data[:40], lambda data: b"", lambda data: b"\xff" * len(data)],
    ids=["end missing", "header cut", "empty", "no header"],
)
def test_a_damaged_file_is_named(file, damage):
    data = damage(file.read_bytes())
    file.write_bytes(data)
    message = (
        rf"bank.safetensors \({len(data):,} bytes\) is damaged or no safetensors file: .*Choose a file that Save Char"
    )
    with pytest.raises(ValueError, match=message):
        load_bank(file)


def test_pickled_code_is_not_run(tmp_path):
    path = tmp_path / "bank.safetensors"
    path.write_bytes(pickle.dumps(Malice(str(tmp_path / "owned"))))
    with pytest.raises(ValueError, match="is damaged or no safetensors file"):
        load_bank(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "state, metadata",
    [
        ({"lora_unet_output_blocks_0_1.lora_up.weight": torch.zeros(4, 2)}, {"ss_network_dim": "2"}),
        ({"latent_tensor": torch.zeros(1, 4, 8, 8), "latent_format_version_0": torch.zeros(0)}, None),
        ({"model.diffusion_model.out.2.weight": torch.zeros(4, 4, 3, 3)}, None),
    ],
    ids=["lora", "latent", "checkpoint"],
)
def test_files_of_another_kind_are_refused(tmp_path, state, metadata):
    path = tmp_path / "other.safetensors"
    save_file(state, path, metadata=metadata)
    with pytest.raises(
        ValueError, match="other.safetensors is no character bank. Choose a file that Save Character Bank"
    ):
        load_bank(path)


def rewrite(path, change_state=None, **changes) -> None:
    """Change a bank's file: tensors by a function, or entries of its description; None removes one."""
    with safe_open(path, framework="pt") as opened:
        state = {key: opened.get_tensor(key).clone() for key in opened.keys()}
        described = json.loads(opened.metadata()[FORMAT.key])
    described = {key: value for key, value in {**described, **changes}.items() if value is not None}
    save_file(change_state(state) if change_state else state, path, metadata={FORMAT.key: json.dumps(described)})


def test_rewriting_alone_changes_nothing(file):
    rewrite(file)
    assert same_bank(load_bank(file), bank_of("Ann", "Ben"))


@pytest.mark.parametrize("version", [2, 0, "1", None])
def test_another_version_of_the_format_is_refused(file, version):
    rewrite(file, version=version)
    with pytest.raises(ValueError, match=f"has version {version} of the format, expected 1. Update this pack, or"):
        load_bank(file)


@pytest.mark.parametrize(
    "changes",
    [
        {"characters": None},
        {"characters": ["Ann"]},
        {"characters": 2},
        {"origin": None},
        {"origin": {"model": "m", "sigmas": [1.0, 0.0], "width": 8, "height": 8}},
        {"origin": {**dataclasses.asdict(ORIGIN), "sharing": {**dataclasses.asdict(SHARING), "rate_32": 2.0}}},
        {"origin": {**dataclasses.asdict(ORIGIN), "sharing": {**dataclasses.asdict(SHARING), "other": 1}}},
        {"origin": {**dataclasses.asdict(ORIGIN), "sigmas": None}},
        {"change_state": lambda state: {"0/0.0.1.0.output.0": torch.zeros(2, 6)}},
        {"change_state": lambda state: {"0/0.0.1.zero.output.0.3": torch.zeros(2, 6)}},
        {"change_state": lambda state: {**state, "weight": torch.zeros(2, 6)}},
        {"change_state": lambda state: {**state, "0/0.0.1.0.output.0.3": torch.zeros(1, 2, 6)}},
        {"change_state": lambda state: {**state, "-1/0.0.1.0.output.0.3": torch.zeros(2, 6)}},
    ],
)
def test_a_description_that_does_not_fit_is_refused(file, changes):
    rewrite(file, **changes)
    with pytest.raises(ValueError, match="bank.safetensors is not a character bank that this version can read"):
        load_bank(file)


@pytest.mark.parametrize("described", ["{", "[1]", "null", '"text"', "1"])
def test_a_description_that_is_none_is_refused(tmp_path, described):
    path = tmp_path / "bank.safetensors"
    save_file({"0/0.0.1.0.output.0.3": torch.zeros(2, 6)}, path, metadata={FORMAT.key: described})
    with pytest.raises(ValueError, match="is not a character bank that this version can read"):
        load_bank(path)


def test_a_character_without_tokens_is_refused(file):
    rewrite(file, lambda state: {key: kept for key, kept in state.items() if key.startswith("0/")})
    with pytest.raises(ValueError, match="holds nothing of Ben. Save the bank again"):
        load_bank(file)


# Folders


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """ComfyUI's models and output folders, empty."""
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    character_bank.register_folder()
    return tmp_path


def test_banks_of_both_folders_are_listed(folders):
    assert character_bank.FILES.names() == []
    for parent, name in [("output", "a"), ("models", "b"), ("output", "sub/c")]:
        path = folders / parent / "character_banks" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_bank(bank_of("Ann"), path)
    (folders / "output" / "character_banks" / "notes.txt").write_text("no bank", encoding="utf-8")
    assert sorted(character_bank.FILES.names()) == ["a.safetensors", "b.safetensors", "sub/c.safetensors"]
    assert character_bank.FILES.find("b.safetensors") == folders / "models" / "character_banks" / "b.safetensors"
    assert same_bank(load_bank(character_bank.FILES.find("sub/c.safetensors")), bank_of("Ann"))


def test_a_missing_bank_is_explained(folders):
    with pytest.raises(
        FileNotFoundError, match="Character bank 'x.safetensors' was not found. Save one with Save"
    ) as found:
        character_bank.FILES.find("x.safetensors")
    for parent in ("models", "output"):
        assert str(folders / parent / "character_banks") in str(found.value)
