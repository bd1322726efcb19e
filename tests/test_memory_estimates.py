"""What ComfyUI is told that a network needs, beside the counted peak of a guided step at published width.

Counted on the meta device: all tensors alive at once, from the conditioning that a run keeps to the prediction.
"""

import comfy.model_management
import comfy.ops
import comfy_kitchen.backends.eager.rope
import pytest
import torch
from activation_memory import ActivationPeak

from consistent_video.loaders.assembly import published_latent_format
from consistent_video.loaders.families import CONSISID, CONSISTI2V, I2VGENXL, MODELSCOPE
from consistent_video.models import consisid_blocks
from consistent_video.models.adopt import adopt
from consistent_video.models.base import VideoModelConfig
from consistent_video.models.i2vgenxl import IMAGE_EMBEDDING
from consistent_video.samplers import schedules

# ConsisID as published, but for its depth: all blocks work one after another.
CONSISID_SETTINGS = {
    "num_attention_heads": 48,
    "in_channels": 32,
    "num_layers": 4,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
    "is_train_face": True,
}
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def card(monkeypatch):
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.ops, "scaled_dot_product_attention", fused)


def fused(queries, keys, values, *args, **kwargs):
    """What the fused kernels of a card allocate: (B, L, H, D) in memory, and a float32 number per query."""
    batch, heads, length, _ = queries.shape
    out = torch.empty(batch, length, heads, values.shape[-1], dtype=queries.dtype, device=queries.device)
    torch.empty(batch, heads, length, dtype=torch.float32, device=queries.device)
    return out.transpose(1, 2)


def model_of(family, dtype=HALF, **settings):
    with torch.device("meta"):
        network = family.network(**settings).to(dtype).eval().requires_grad_(False)
    adopt(network, comfy.ops.disable_weight_init, family.replacements)
    config = VideoModelConfig(
        dtype, None, published_latent_format(family), family.width(network.config), {"timesteps": 1000}
    )
    return family.model(config, family.scheduler, schedules.table_sigmas(family.scheduler), lambda operations: network)


def ratio(model, frames, height, width, condition, prompts=2):
    """Estimate beside the counted peak of a step of `prompts` prompts, `condition` giving what is kept of each."""
    dtype, shape = model.get_dtype_inference(), (prompts, model.latent_format.latent_channels, frames, height, width)
    with torch.device("meta"):
        noisy, timesteps = torch.empty(shape), torch.empty(prompts)
        with ActivationPeak(model.diffusion_model) as activations:
            kept = [condition() for _ in range(prompts)]
            joined = {name: torch.cat([one[name] for one in kept]) for name in kept[0] if name != "rotary"}
            constants = {name: kept[0][name] for name in kept[0].keys() - joined.keys()}
            model.diffusion_model((0.5 * noisy).to(dtype), timesteps, None, None, {}, **joined, **constants)
    given = {name: [tuple(one[name].shape) for one in kept] for name in joined}
    assert model.memory_required(shape, cond_shapes=given) == pytest.approx(model.memory_required(shape), rel=0.15)
    return model.memory_required(shape, cond_shapes=given, memory_efficient_attention=True) / activations.peak


def text_of(model, dtype=HALF):
    network = model.diffusion_model
    return lambda: {"text_keys_values": network.project_text(torch.empty(1, 77, 1024, dtype=dtype))}


@pytest.fixture(scope="module")
def modelscope():
    return model_of(MODELSCOPE)


@pytest.mark.parametrize(
    ("frames", "height", "width", "prompts"),
    [(16, 32, 32, 2), (16, 32, 32, 1), (64, 32, 32, 2), (24, 40, 72, 2), (16, 64, 64, 2), (24, 72, 128, 2)],
)
def test_modelscope(modelscope, frames, height, width, prompts):
    assert 1.0 <= ratio(modelscope, frames, height, width, text_of(modelscope), prompts) < 1.2


def test_modelscope_in_single_precision():
    model = model_of(MODELSCOPE, torch.float32)
    assert 1.0 <= ratio(model, 16, 32, 32, text_of(model, torch.float32)) < 1.2


def picture_of(model, frames, height, width, embeddings=1):
    def condition():
        inputs = (1, 77, 1024), (1, 4, frames, height, width), (1, embeddings, 1024)
        known = model.diffusion_model.condition(*(torch.empty(size, dtype=HALF) for size in inputs), torch.empty(1))
        tokens = {"context_tokens": known.context, "keys_values": known.keys_values}
        return {**tokens, "picture": known.picture, "fps_embedding": known.fps}

    return condition


@pytest.fixture(scope="module")
def i2vgenxl():
    return model_of(I2VGENXL)


@pytest.mark.parametrize("prompts", [1, 2])
def test_i2vgenxl(i2vgenxl, prompts):
    assert 1.0 <= ratio(i2vgenxl, 16, 88, 160, picture_of(i2vgenxl, 16, 88, 160), prompts) < 1.2


def test_transitions_keep_keys_and_values_for_every_frame(i2vgenxl):
    """A frame's embedding of its own makes 16 times the keys and values, which the shapes of a prompt announce."""
    shape, condition = (2, 4, 16, 64, 64), picture_of(i2vgenxl, 16, 64, 64, embeddings=16)
    with torch.device("meta"), ActivationPeak(i2vgenxl.diffusion_model) as activations:
        kept = [condition() for _ in range(2)]
        joined = {name: torch.cat([one[name] for one in kept]) for name in kept[0]}
        i2vgenxl.diffusion_model(torch.empty(shape, dtype=HALF), torch.empty(2), None, None, {}, **joined)
        prompt = {"cross_attn": torch.empty(1, 77, 1024), IMAGE_EMBEDDING: torch.empty(1, 16, 1024)}
    announced = i2vgenxl.extra_conds_shapes(**prompt)
    assert announced == {name: list(kept[0][name].shape) for name in ("context_tokens", "keys_values")}
    given = {name: [size, size] for name, size in announced.items()}
    assert 1.0 <= i2vgenxl.memory_required(shape, cond_shapes=given) / activations.peak < 1.2
    assert i2vgenxl.memory_required(shape) / activations.peak < 1.0


def test_a_long_prompt_counts_with_its_length(modelscope):
    short = modelscope.memory_required((2, 4, 16, 32, 32))
    announced = modelscope.extra_conds_shapes(cross_attn=torch.empty(1, 3 * 77, 1024, device="meta"))
    long = modelscope.memory_required(
        (2, 4, 16, 32, 32), cond_shapes={name: [size] for name, size in announced.items()}
    )
    width = modelscope.diffusion_model.text_width
    assert long - short == pytest.approx(1.06 * 2 * 2 * 2 * 77 * width * 2)


@pytest.fixture(scope="module")
def consisti2v():
    return model_of(CONSISTI2V)


@pytest.mark.parametrize(
    ("frames", "height", "width", "prompts"), [(16, 32, 32, 2), (16, 64, 64, 2), (16, 64, 64, 1), (16, 88, 160, 2)]
)
def test_consisti2v(consisti2v, frames, height, width, prompts):
    def condition():
        first = torch.empty(1, 4, 1, height, width)
        return {**text_of(consisti2v)(), "first_frame_latents": first, "frame_stride": torch.empty(1)}

    assert 1.0 <= ratio(consisti2v, frames, height, width, condition, prompts) < 1.2


@pytest.fixture(scope="module")
def consisid():
    return model_of(CONSISID, **CONSISID_SETTINGS)


@pytest.mark.parametrize("rotation", ["kernel", "copies"])
@pytest.mark.parametrize(("frames", "prompts"), [(13, 2), (13, 1), (3, 2), (1, 1)])
def test_consisid(consisid, monkeypatch, rotation, frames, prompts):
    if rotation == "copies":
        monkeypatch.setattr(consisid_blocks, "apply_rope1", comfy_kitchen.backends.eager.rope.apply_rope1)

    def condition():
        inputs = (1, 226, 4096), (1, 16, frames, 60, 90), (1, 1280), *[(1, 577, 1024)] * 5
        text, picture, identity, *vision = (torch.empty(size, dtype=HALF) for size in inputs)
        known = consisid.diffusion_model.condition(text, picture, identity, vision)
        tokens = {"text_tokens": known.text, "picture_tokens": known.picture, "face_keys_values": known.face}
        return {**tokens, "rotary": (known.rotary,)}

    assert 1.0 <= ratio(consisid, frames, 60, 90, condition, prompts) < 1.25
