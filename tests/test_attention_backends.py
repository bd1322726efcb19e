"""Backends of attention that refuse what their real kernels refuse, behind every network of the pack.

ComfyUI takes xformers as soon as it is installed, and Sage or flash attention when asked; none of them runs here. What
stands in for them computes with PyTorch, and raises where the real one does.
"""

import comfy.ldm.modules.attention as backends
import comfy.model_management
import comfy.ops
import pytest
import tiny_motion_predictor
import torch
from test_consisid_network import PUBLISHED as CONSISID

from consistent_video.models import attention, consisid_transformer, unet3d
from consistent_video.models.adopt import adopt
from consistent_video.models.consisid_transformer import ConsisIDTransformer
from consistent_video.models.consisti2v_unet import ConsistI2VUNet
from consistent_video.models.i2vgenxl_unet import I2VGenXLUNet
from consistent_video.models.motion_predictor import MotionPredictor
from consistent_video.models.photomaker_resampler import FacePerceiver
from consistent_video.models.transformer import OptimizedAttention
from consistent_video.models.unet3d import ModelScopeUNet

SHALLOW = {"layers_per_block": 1, "attention_head_dim": 64}
ALLOWED = {
    "attention_xformers": range(8, 1025, 8),
    "attention_sage": (64, 96, 128),
    "attention_flash": range(8, 257, 8),
}
ERRORS = {"attention_xformers": NotImplementedError, "attention_sage": AssertionError, "attention_flash": RuntimeError}


def strict(name: str, kind: str | None = None):
    """A backend of this name with the limits of `kind`; it keeps the widths that it computed and refused."""

    def backend(q, k, v, heads, mask=None, skip_reshape=False, **kwargs):
        width = q.shape[-1] if skip_reshape else q.shape[-1] // heads
        whole = kind == "attention_xformers" or q.dtype in (torch.float16, torch.bfloat16) or name != kind
        if width not in ALLOWED[kind] or not whole or q.shape[0] > 65535:
            backend.refused.append(width)
            raise ERRORS[kind](f"no kernel for {tuple(q.shape)} {q.dtype}")
        backend.computed.append(width)
        return backends.attention_pytorch(q, k, v, heads, mask, skip_reshape=skip_reshape, **kwargs)

    kind = kind or name
    backend.computed, backend.refused, backend.__name__ = [], [], name
    return backends.wrap_attn(backend), backend


def half(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


def run_modelscope():
    network = adopt(ModelScopeUNet(**SHALLOW).bfloat16(), comfy.ops.manual_cast, unet3d.REPLACEMENTS)
    network(half(2, 4, 3, 8, 8), torch.empty(2), half(2, 7, 1024))


def run_i2vgenxl():
    network = I2VGenXLUNet(layers_per_block=1, num_attention_heads=64).bfloat16()
    network = adopt(network, comfy.ops.manual_cast, unet3d.REPLACEMENTS)
    x = half(2, 4, 3, 32, 32)
    known = network.condition(half(2, 7, 1024), x, half(2, 1, 1024), torch.empty(2))
    network(x, torch.empty(2), keys_values=known.keys_values, picture=known.picture, fps_embedding=known.fps)


def run_consisti2v():
    network = adopt(ConsistI2VUNet(layers_per_block=1).bfloat16(), comfy.ops.manual_cast)
    network(half(2, 4, 3, 8, 8), torch.empty(2), half(2, 7, 1024))


def run_consisid():
    network = ConsisIDTransformer(**{**CONSISID, "num_layers": 2, "use_learned_positional_embeddings": False})
    network = adopt(network.bfloat16(), comfy.ops.manual_cast, consisid_transformer.REPLACEMENTS)
    face = half(1, 1280), [half(1, 577, 1024)] * 5
    known = network.condition(half(1, 226, 4096), half(1, 16, 2, 8, 8), *face)
    rest = {"rotary": (known.rotary,), "face_keys_values": known.face}
    network(half(1, 16, 2, 8, 8), torch.empty(1), text_tokens=known.text, picture_tokens=known.picture, **rest)


def run_motion_predictor():
    network = adopt(MotionPredictor(num_layers=1, image_token_layers=1).bfloat16(), comfy.ops.manual_cast)
    network(*(half(1, 1024),) * 2, *(half(1, 257, 1280),) * 2, 4)


def run_photomaker():
    sizes = (2048, 2, 512, 2048, 1024, 2048, 16, 8192, 1)
    FacePerceiver(*sizes, operations=comfy.ops.manual_cast).bfloat16()(half(1, 512), half(1, 257, 1024))


# The networks at their published widths, and those of their heads.
NETWORKS = {
    run_modelscope: {64},
    run_i2vgenxl: {4, 64},
    run_consisti2v: {40, 64, 80, 160},
    run_consisid: {64, 128},
    run_motion_predictor: {64},
    run_photomaker: {128},
}


@pytest.fixture
def chosen(monkeypatch):
    """A function that makes a backend the one that ComfyUI runs attention with."""

    def choose(name, kind=None):
        whole, inner = strict(name, kind)
        monkeypatch.setattr(backends, "optimized_attention", whole)
        return inner

    return choose


@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_backend_computes_what_it_can_of_a_published_network(network, name, chosen):
    backend = chosen(name)
    with torch.device("meta"):
        network()
    assert set(backend.computed) == NETWORKS[network].intersection(ALLOWED[name])
    # What no kernel takes is known before it is called: the refusal of a real one costs time or a line in the log.
    assert backend.refused == []


@pytest.mark.parametrize("kind", ALLOWED)
@pytest.mark.parametrize("width", [4, 12, 40, 64, 96, 320])
def test_a_backend_without_a_known_name_may_refuse(kind, width, chosen):
    torch.manual_seed(0)
    layer = adopt(OptimizedAttention(2 * width, heads=2, dim_head=width), comfy.ops.manual_cast)
    tokens = torch.randn(3, 5, 2 * width)
    expected = layer(tokens)
    backend = chosen("of_another_pack", kind)
    assert torch.equal(layer(tokens), expected)
    assert bool(backend.computed) == (width in ALLOWED[kind] and width <= 256)


@pytest.mark.parametrize("kind", ALLOWED)
def test_the_motion_predictor_gives_the_same_behind_each(kind, chosen):
    network = adopt(tiny_motion_predictor.network(), comfy.ops.manual_cast)
    config = network.config
    pictures = (torch.randn(2, 1, config["embedding_dim"]), torch.randn(2, 1, 5, config["vision_dim"]))
    inputs = [part for both in pictures for part in both]
    expected = network(*inputs, 4)
    chosen("of_another_pack", kind)
    assert torch.equal(network(*inputs, 4), expected)


@pytest.mark.parametrize("name", ALLOWED)
def test_encoders_on_the_cpu_do_not_ask_a_kernel_of_a_gpu(name, chosen):
    backend = chosen(name)
    tokens = torch.randn(2, 3, 128)
    assert attention.attend(tokens, tokens, tokens, 2).shape == tokens.shape
    assert backend.computed == backend.refused == []


@pytest.mark.parametrize("width", [4, 64])
def test_an_override_stands_in_and_goes_on_with_what_computes(width, chosen):
    backend = chosen("of_another_pack", "attention_sage")
    seen = []

    def override(function, q, k, v, heads, **kwargs):
        seen.append((q.shape, heads, kwargs["transformer_options"]["block"]))
        return function(q, k, 2 * v, heads, **kwargs)

    tokens = torch.randn(2, 3, 2 * width)
    options = {"optimized_attention_override": override, "block": ("input", 1)}
    expected = backends.attention_pytorch(tokens, tokens, 2 * tokens, 2)
    assert torch.equal(attention.attend(tokens, tokens, tokens, 2, transformer_options=options), expected)
    assert seen == [((2, 3, 2 * width), 2, ("input", 1))]
    assert backend.computed == [64] * (width == 64)


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_large_batches_are_cut_on_a_device(shaped, masked, chosen, monkeypatch):
    backend = chosen("of_another_pack", "attention_xformers")
    monkeypatch.setattr(attention, "LARGEST_BATCH", 3)
    shape = (7, 2, 5, 8) if shaped else (7, 5, 16)
    q, k, v = (torch.randn(shape) for _ in range(3))
    mask = torch.randn(7, 5, 5) if masked else None
    options = {"mask": mask, "skip_reshape": shaped}
    expected = backends.attention_pytorch(q, k, v, 2, **options)
    torch.testing.assert_close(attention.attend(q, k, v, 2, **options), expected)
    assert len(backend.computed) == 1
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    for more in ({}, {"skip_output_reshape": True}):
        expected = backends.attention_pytorch(q, k, v, 2, **options, **more)
        torch.testing.assert_close(attention.attend(q, k, v, 2, **options, **more), expected)
    assert len(backend.computed) == 1 + 3 + 3


def test_out_of_memory_goes_to_comfyui(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(backends, "optimized_attention", full)
    tokens = torch.randn(2, 3, 64)
    with pytest.raises(torch.OutOfMemoryError):
        attention.attend(tokens, tokens, tokens, 1)
