"""What ComfyUI is told that a picture needs which reads a character bank, beside the counted peak of a call."""

import comfy.context_windows
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sampler_helpers
import comfy.supported_models
import pytest
import tiny_unets
import torch
from activation_memory import ActivationPeak
from test_character_bank import Story
from test_memory_estimates import fused
from tiny_unets import one_thread  # noqa: F401

from consistent_video.patches import bank_memory
from consistent_video.patches.character_bank import CharacterBank, Evaluation, Slot
from consistent_video.patches.consistent_attention import ConsistentAttention
from consistent_video.patches.shared_layers import shared_layers
from consistent_video.patches.token_sharing import Sharing

PUBLISHED_SDXL = {
    **tiny_unets.SDXL,
    "model_channels": 320,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_head_channels": 64,
    "dtype": torch.float16,
}
META = torch.device("meta")
NAMES = ("Ana", "Leo", "Mia")
SIGMAS = torch.linspace(14.6, 0.0, 51)
STEP = 25


@pytest.fixture
def card(monkeypatch):
    """ComfyUI on a card whose attention is memory efficient."""
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "pytorch_attention_flash_attention", lambda: True)
    monkeypatch.setattr(comfy.ops, "scaled_dot_product_attention", fused)


@pytest.fixture
def loads(monkeypatch):
    """A list of what was asked for at every load: bytes for all prompts at once, and for one."""
    asked = []

    def load(models, memory_required=0, minimum_memory_required=None, **kwargs):
        asked.append((memory_required, minimum_memory_required))

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", load)
    return asked


@pytest.fixture(scope="module")
def published():
    settings = comfy.supported_models.SDXL(dict(PUBLISHED_SDXL))
    settings.set_inference_dtype(torch.float16, None)
    model = comfy.model_base.SDXL(settings, device=META)
    return comfy.model_patcher.ModelPatcher(model, META, META)


def bank_of(model, references: int, side: int) -> CharacterBank:
    """Every layer's tokens of three characters, half of those of their reference pictures, without their memory."""
    characters = {name: {} for name in NAMES}
    for layer, block in shared_layers(model).items():
        channels = block.attn1.to_q.in_features
        tokens = (side // (16 if channels == 640 else 32)) ** 2
        kept = torch.zeros(1, dtype=torch.float16).expand(references * tokens // 2, channels)
        for slots in characters.values():
            slots |= {Slot(Evaluation(kind, 0, STEP, 0), layer): kept for kind in (0, 1)}
    return CharacterBank(None, characters)


def peak(model, panels: int, side: int) -> int:
    """Bytes of a guided call at published size."""
    rows, size = 2 * panels, side // 8
    options = {**model.model_options["transformer_options"], "wrappers": model.wrappers}
    options |= {"cond_or_uncond": [0, 1], "sigmas": SIGMAS[STEP : STEP + 1], "sample_sigmas": SIGMAS}
    noisy, timesteps = torch.empty(rows, 4, size, size, device=META), torch.empty(rows, device=META)
    text, pooled = (torch.empty(rows, *shape, dtype=torch.float16, device=META) for shape in ((77, 2048), (2816,)))
    with ActivationPeak(model.model.diffusion_model) as activations:
        model.model.diffusion_model(noisy.half(), timesteps, context=text, y=pooled, transformer_options=options)
    return activations.peak


def announced(model, panels: int, side: int, loads: list) -> tuple[float, float]:
    """What ComfyUI reserves before a run of two prompts."""
    conds = {"positive": [{}], "negative": [{}]}
    options = {"transformer_options": {"wrappers": model.wrappers}}
    comfy.sampler_helpers.prepare_sampling(model, (panels, 4, side // 8, side // 8), conds, model_options=options)
    return loads.pop()


@pytest.mark.slow
@pytest.mark.parametrize(("panels", "references"), [(1, 16), (4, 16), (1, 48)])
def test_sdxl_that_reads_a_bank(published, card, loads, panels, references):
    sharing = Sharing(plain_early=0.0, plain_late=0.0)
    bank = bank_of(published, references, 1024)
    reading = ConsistentAttention(sharing, bank=bank, characters=NAMES).install(published)
    both, one = announced(reading, panels, 1024, loads)
    assert one == pytest.approx(both / 2)
    assert 1.0 <= both / peak(reading, panels, 1024) < 1.3
    plain = published.model.memory_required([2 * panels, 4, 128, 128])
    assert announced(published, panels, 1024, loads)[0] == plain < both


def test_a_small_bank_changes_nothing(published, card, loads):
    bank = bank_of(published, 1, 256)
    reading = ConsistentAttention(Sharing(), bank=bank, characters=NAMES[:1]).install(published)
    assert announced(reading, 4, 1024, loads) == announced(published, 4, 1024, loads)


@pytest.fixture(scope="module")
def story():
    return Story(tiny_unets.build("sdxl"))


@pytest.fixture(scope="module")
def large(story):
    """A bank, and the elements of the layer with most of them."""
    tokens = {slot: kept.repeat(400, 1) for slot, kept in story.write()[1].items()}
    return story.bank(Ana=tokens), max(kept.numel() for kept in tokens.values())


def test_every_step_counts_what_its_prompts_read(story, large, monkeypatch):
    bank, elements = large
    counted, plain = [], comfy.model_base.BaseModel.memory_required

    def memory_required(model, input_shape, cond_shapes={}, **kwargs):
        found = plain(model, input_shape, cond_shapes=cond_shapes, **kwargs)
        if bank_memory.KEY in cond_shapes:
            counted.append((list(input_shape), len(cond_shapes[bank_memory.KEY]), found))
        return found

    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", memory_required)
    story.read(slice(3, 5), bank, "Ana")
    panels = story.model.model.memory_required([2, 4, 8, 8])
    extra = 4 * elements * 4 - 0.2 * panels
    assert extra > 0.5 * panels
    assert {(tuple(shape), prompts) for shape, prompts, _ in counted} >= {((4, 4, 8, 8), 2)}
    for (rows, *_), prompts, found in counted:
        assert rows == 2 * prompts and found == pytest.approx(prompts * (panels + extra))


def test_the_model_itself_stays_as_it_was(story, large):
    before = story.model.model.memory_required([2, 4, 8, 8])
    story.read(slice(3, 4), large[0], "Ana")
    cond_shapes = {bank_memory.KEY: [[1, 1, 1e6]]}
    comfy.model_management.unload_all_models()
    assert story.model.model.memory_required([2, 4, 8, 8], cond_shapes=cond_shapes) == before


@pytest.mark.parametrize("windows_first", [False, True])
def test_context_windows_count_the_panels_of_one(story, large, loads, windows_first):
    """In any order of the two patches, 16 panels in windows of 4 need as much as 4."""
    patch = ConsistentAttention(story.sharing, bank=large[0], characters=["Ana"])

    def windows(model):
        model = model.clone()
        schedule, fuse = comfy.context_windows.get_matching_context_schedule("standard_static"), "flat"
        fuse = comfy.context_windows.get_matching_fuse_method(fuse)
        handler = comfy.context_windows.IndexListContextHandler(schedule, fuse, context_length=4, dim=0)
        model.model_options["context_handler"] = handler
        comfy.context_windows.create_prepare_sampling_wrapper(model)
        return model

    model = patch.install(windows(story.model)) if windows_first else windows(patch.install(story.model))
    options = {**model.model_options, "transformer_options": {"wrappers": model.wrappers}}
    conds = {"positive": [{}], "negative": [{}]}
    comfy.sampler_helpers.prepare_sampling(model, (16, 4, 8, 8), conds, model_options=options)
    inside = loads.pop()
    reading = patch.install(story.model)
    options = {"transformer_options": {"wrappers": reading.wrappers}}
    comfy.sampler_helpers.prepare_sampling(reading, (4, 4, 8, 8), conds, model_options=options)
    assert inside == loads.pop()
