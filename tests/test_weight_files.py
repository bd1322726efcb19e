"""Files of weights as trainers, tools and downloads leave them: each is read, or named for what it is."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from consistent_video.loaders import audit, checkpoint, photomaker, single_file, weights
from consistent_video.loaders.families import MODELSCOPE
from consistent_video.loaders.state_dicts import unscale

STEM = "diffusion_pytorch_model"


@pytest.fixture(scope="module")
def state(modelscope_folder):
    return load_file(modelscope_folder / "unet" / f"{STEM}.safetensors")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def behind(state, prefix):
    return {prefix + key: value for key, value in state.items()}


def inside(state, part, name):
    return {key.replace(f"{part}.", f"{part}.{name}."): value for key, value in state.items()}


LAYOUTS = {
    "Lightning": lambda state: {"state_dict": behind(state, "model."), "epoch": 3, "hyper_parameters": {"lr": 1e-4}},
    "DeepSpeed": lambda state: {"module": state, "global_steps": 3, "ds_config": {}, "optimizer": {"state": {}}},
    "nested twice": lambda state: {"model": {"state_dict": state}, "step": torch.tensor(4)},
    "beside its moving average": lambda state: {"model": state, "ema": {k: v + 1 for k, v in state.items()}},
    "beside an optimizer": lambda state: {"optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}, "net": state},
    "moving average alone": lambda state: {"ema": state},
    "prefix module.": lambda state: behind(state, "module."),
    "torch.compile": lambda state: behind(state, "_orig_mod."),
    "torch.compile in DDP": lambda state: behind(state, "module._orig_mod."),
    "DDP in a pipeline": lambda state: behind(state, "unet.module."),
    "torch.compile of a block": lambda state: inside(state, "mid_block", "_orig_mod"),
    "FSDP": lambda state: inside(state, "down_blocks.0", "_fsdp_wrapped_module"),
    "LDM": lambda state: behind(state, "model.diffusion_model."),
    "a prefix that nobody knows": lambda state: behind(state, "student.net_v2."),
    "two networks": lambda state: behind(state, "model.") | {f"model_ema.{k}": v + 1 for k, v in state.items()},
    "with a text encoder": lambda state: (
        behind(state, "model.diffusion_model.") | {"cond_stage_model.x.weight": torch.full((2,), float("nan"))}
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_networks_are_found_in_what_trainers_write(tmp_path, state, layout):
    path = tmp_path / "network.pth"
    torch.save(LAYOUTS[layout](state), path)
    assert_same(single_file.read_network(path).state, state)


@pytest.mark.parametrize("name", ["network.pt", "network.bin", "network.ckpt", "network.SAFETENSORS", "network.sft"])
def test_safetensors_are_read_under_any_ending(tmp_path, state, name):
    save_file(state, tmp_path / name)
    assert_same(single_file.read_network(tmp_path / name).state, state)


PAGE = b"<!DOCTYPE html><html><body>Sign in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 2823000000\n"
CONTENTS = {
    "pointer": (POINTER, ["pointer", "2,823,000,000 bytes", "ownload"]),
    "page": (PAGE, ["web page", "ownload"]),
    "page after a byte order mark": (b"\xef\xbb\xbf\n" + PAGE.lower(), ["web page"]),
    "error": (b'{"error": "Repository not found"}', ["JSON text", "ownload"]),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', ["web page"]),
    "nothing": (b"", ["empty (0 bytes)", "ownload"]),
    "GGUF": (b"GGUF" + bytes(100), ["GGUF", ".safetensors"]),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(100), ["archive (7z)", "Unpack"]),
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("ending", [".safetensors", ".bin"])
def test_what_is_not_weights_is_named(tmp_path, content, ending):
    path, (data, words) = tmp_path / f"{STEM}{ending}", CONTENTS[content]
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:
        weights.read_file(path)
    assert [word for word in [str(path), *words] if word not in str(caught.value)] == []
    assert "pickled" not in str(caught.value)


def test_a_pytorch_file_named_safetensors_is_named(tmp_path, state):
    path = tmp_path / "network.safetensors"
    torch.save(state, path)
    with pytest.raises(ValueError, match="is a PyTorch file, although its name ends in .safetensors. Rename it"):
        single_file.read_network(path)


def test_a_short_file_tells_both_sizes(tmp_path, state):
    path = tmp_path / "network.safetensors"
    save_file(state, path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"it has {size - 1000:,} bytes, but its header describes {size:,}"):
        weights.read_file(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(2)], "found a"),
        ({"shadow_params": [torch.ones(2)], "decay": 0.999}, r"list without names \(shadow_params\)"),
        ({"epoch": 3, "lr": 0.1}, "named tensors only"),
        ({}, "found nothing"),
    ],
)
def test_tensors_without_names_are_named(tmp_path, content, words):
    path = tmp_path / "network.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=words):
        weights.read_weights([path])


@pytest.mark.parametrize(
    ("present", "half", "taken"),
    [
        (["", "fp16"], False, ""),
        (["", "fp16"], True, "fp16"),
        (["bf16"], False, "bf16"),
        (["ema", "non_ema"], False, "ema"),
        (["non_ema"], True, "non_ema"),
        (["non_ema", "fp16"], False, "fp16"),
        (["", "bf16", "non_ema"], True, "bf16"),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_variants_are_taken_in_order(tmp_path, present, half, taken, sharded, caplog):
    caplog.set_level(logging.INFO)
    for number, variant in enumerate(present):
        stem = ".".join(filter(None, (STEM, variant)))
        if sharded:
            shards = [f"{stem}-0000{part}-of-00002.safetensors" for part in (1, 2)]
            for part, name in enumerate(shards):
                save_file({f"part{part}": torch.full((1,), float(number))}, tmp_path / name)
            index = ".".join(filter(None, (STEM, "safetensors", "index", variant, "json")))
            (tmp_path / index).write_text(
                json.dumps({"weight_map": {"part0": shards[0], "part1": shards[1]}}), encoding="utf-8"
            )
        else:
            save_file({"part0": torch.full((1,), float(number))}, tmp_path / f"{stem}.safetensors")
    found = weights.read_weights(weights.find_weights(tmp_path, STEM, half))
    assert found["part0"].item() == present.index(taken)
    assert len(found) == 1 + sharded
    if len(present) > 1:
        assert f"reads {taken or 'the plain one'}" in caplog.text


def test_shards_without_an_index_are_read_or_missed(tmp_path):
    for part in (1, 2, 3):
        save_file({f"part{part}": torch.ones(1)}, tmp_path / f"model-0000{part}-of-00003.safetensors")
    assert len(weights.read_weights(weights.find_weights(tmp_path, "model"))) == 3
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks the shards 2 of 3 of model"):
        weights.find_weights(tmp_path, "model")


@pytest.mark.parametrize("ending", [".part", ".crdownload", ".incomplete"])
def test_an_unfinished_download_is_named(tmp_path, ending):
    (tmp_path / f"{STEM}.safetensors{ending}").write_bytes(bytes(10))
    with pytest.raises(FileNotFoundError, match=f"The download of {STEM}.safetensors{ending} has not finished"):
        weights.find_weights(tmp_path, STEM)


@pytest.mark.parametrize("names", [("scale_weight", "scaled_fp8"), ("weight_scale", None)])
@pytest.mark.parametrize("rows", [False, True])
def test_scaled_weights_are_multiplied(tmp_path, state, names, rows):
    scale_name, marker = names
    scaled = {} if marker is None else {marker: torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for key, value in state.items():
        scaled[key] = value.clone()
        if value.ndim == 2:
            peaks = value.abs().amax(dim=1) if rows else value.abs().amax()
            scale = peaks / 448
            scaled[key] = (value / (scale[:, None] if rows else scale)).to(torch.float8_e4m3fn)
            layer = key.removesuffix(".weight")
            scaled[f"{layer}.{scale_name}"] = scale
            scaled[f"{layer}.scale_input"] = torch.ones(())
    path = tmp_path / "scaled.safetensors"
    save_file({f"model.diffusion_model.{key}": value for key, value in scaled.items()}, path)
    found = single_file.read_network(path).state
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert (found[key].float() - value).abs().max() <= 0.07 * value.abs().max()
    assert single_file.load_file(path, "auto", "fp32").model.diffusion_model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("ending", ["absmax", "qweight", "weight_scale_2"])
def test_packed_weights_are_named(tmp_path, ending):
    with pytest.raises(ValueError, match="quantised by .* which this pack does not read"):
        unscale(tmp_path / "x", {"layer.weight": torch.zeros(2), f"layer.{ending}": torch.zeros(2)})


def test_scales_of_blocks_are_refused(tmp_path):
    state = {"a.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn), "a.weight_scale": torch.ones(4, 2)}
    with pytest.raises(ValueError, match=r"8 scales for a.weight of shape \(4, 8\)"):
        unscale(tmp_path / "x", state)


def test_position_ids_are_no_weights(models_folder, modelscope_folder, tmp_path):
    content = torch.load(models_folder / "photomaker" / "photomaker-v1.bin", weights_only=True)
    content["id_encoder"]["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    torch.save(content, tmp_path / "older.bin")
    assert photomaker.load_photomaker(tmp_path / "older.bin")[1].keys() == content["lora_weights"].keys()
    folder = tmp_path / "older"
    shutil.copytree(modelscope_folder, folder)
    path = folder / "text_encoder" / "model.safetensors"
    ids = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(path) | ids, path)
    checkpoint.load_folder_clip(MODELSCOPE, folder)


def test_a_configuration_beside_a_file_completes_it(models_folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    folder = models_folder / "diffusers" / "ConsisID-preview" / "transformer"
    (weights_file,) = folder.glob("*.safetensors")
    path = tmp_path / "consisid.safetensors"
    shutil.copy(weights_file, path)
    assert not single_file.read_network(path).config.get("is_kps")
    assert "put its config.json beside it as consisid.json" in caplog.text
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"is_kps": True}
    path.with_suffix(".json").write_text(json.dumps(config), encoding="utf-8")
    assert single_file.load_file(path, "auto", "fp32").model.diffusion_model.config.is_kps
    path.with_suffix(".json").write_text(json.dumps({"_class_name": "Other", "is_kps": True}), encoding="utf-8")
    assert not single_file.read_network(path).config.get("is_kps")


def test_audit_reports_files_as_they_are_loaded(models_folder, state):
    path = models_folder / "diffusion_models" / "nested.pth"
    torch.save({"module": behind(state, "_orig_mod.")}, path)
    (models_folder / "diffusion_models" / "pointer.safetensors").write_bytes(POINTER)
    try:
        report = audit.report("diffusion_models/nested.pth")
        assert "Missing keys: none\nUnexpected keys: none" in report and "use Load Video Diffusion Model" in report
        assert "only the pointer" in audit.report("diffusion_models/pointer.safetensors")
    finally:
        path.unlink()
        (models_folder / "diffusion_models" / "pointer.safetensors").unlink()
