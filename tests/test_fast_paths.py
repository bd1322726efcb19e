"""What the network computes another way on a CPU gives the same numbers, with ComfyUI's casts and patches."""

import comfy.ops
import pytest
import torch
from diffusers import UNet3DConditionModel
from diffusers.models.attention import FeedForward

from consistent_video.models import convolution, transformer
from consistent_video.models.adopt import adopt
from consistent_video.models.layer_pass import distinct_clips
from consistent_video.models.unet3d import REPLACEMENTS, ModelScopeUNet

TINY = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def products(monkeypatch):
    """Counts the convolutions that run as a matrix product, whatever their size."""
    monkeypatch.setattr(convolution, "LARGE_KERNEL_BYTES", 0)
    monkeypatch.setattr(convolution, "KERNEL_BYTES_PER_PIXEL", 1)
    taken, suits = [], convolution.FewPixelConvolution._suits
    monkeypatch.setattr(
        convolution.FewPixelConvolution, "_suits", lambda *args: suits(*args) and (taken.append(1) or True)
    )
    return taken


@pytest.mark.parametrize("kernel,stride,padding", [(3, 1, 1), (3, 2, 1), (1, 1, 0), ((3, 2), (2, 1), (0, 1))])
@pytest.mark.parametrize("bias", [True, False])
def test_convolution_as_product(products, kernel, stride, padding, bias):
    layer = torch.nn.Conv2d(6, 10, kernel, stride, padding, bias=bias).requires_grad_(False)
    inputs = noise(3, 6, 5, 4).to(memory_format=torch.channels_last)
    expected = layer(inputs)
    found = adopt(layer, comfy.ops.manual_cast)(inputs)
    assert products == [1]
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6, check_stride=False)


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding_mode": "reflect"}, {"padding": "same"}])
def test_other_convolutions_stay(products, options):
    layer = torch.nn.Conv2d(6, 10, 3, **{"padding": 1, **options}).requires_grad_(False)
    inputs = noise(3, 6, 5, 4)
    expected = layer(inputs)
    assert torch.equal(adopt(layer, comfy.ops.manual_cast)(inputs), expected)
    assert products == []


def test_convolution_as_product_casts_and_patches(products):
    layer = torch.nn.Conv2d(6, 10, 3, padding=1).half().requires_grad_(False)
    weight, bias, inputs = layer.weight.float(), layer.bias.float(), noise(3, 6, 2, 2)
    adopt(layer, comfy.ops.manual_cast).weight_function = [lambda kernel: kernel * 2]
    expected = torch.nn.functional.conv2d(inputs, weight * 2, bias, padding=1)
    torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=2e-6)
    assert products == [1]


@pytest.mark.parametrize(
    "megabytes,images,side,faster", [(59, 16, 2, True), (59, 16, 4, False), (118, 16, 4, True), (15, 16, 2, False)]
)
def test_only_large_kernels_over_few_pixels(megabytes, images, side, faster):
    layer = adopt(torch.nn.Conv2d(1, 1, 3, padding=1, device="meta"), comfy.ops.manual_cast)
    kernel = torch.empty(megabytes * 10**6 // 36, 1, 3, 3, device="meta")
    assert layer._suits(torch.empty(images, 1, side, side, device="meta"), kernel) is faster


@pytest.mark.parametrize("rows", [1, 7, 8])
def test_feed_forward_in_chunks(monkeypatch, rows):
    monkeypatch.setattr(transformer, "CPU_ROWS", 4)
    network = torch.nn.Sequential(FeedForward(12, activation_fn="geglu")).requires_grad_(False)
    inputs = noise(2, rows, 12)
    expected = network(inputs)
    adopt(network, comfy.ops.manual_cast, REPLACEMENTS)
    torch.testing.assert_close(network(inputs), expected, rtol=0, atol=1e-6)


def test_feed_forward_respects_adapters_that_bypass_weights():
    network = adopt(torch.nn.Sequential(FeedForward(12, activation_fn="geglu")), comfy.ops.manual_cast, REPLACEMENTS)
    inputs, last = noise(2, 3, 12), network[0].net[2]
    expected = network(inputs) + 1
    original = last.forward
    last.forward = lambda hidden: original(hidden) + 1
    torch.testing.assert_close(network(inputs), expected, rtol=0, atol=1e-6)


def test_guided_clips_share_the_layers_before_the_text():
    torch.manual_seed(0)
    reference, ours = UNet3DConditionModel(**TINY).eval(), ModelScopeUNet(**TINY).eval()
    ours.load_state_dict(reference.state_dict())
    adopt(ours, comfy.ops.manual_cast, REPLACEMENTS)
    clips, timesteps = noise(2, 4, 3, 8, 6), torch.tensor([500.0, 20.0])
    x, t, text = clips.repeat(2, 1, 1, 1, 1), timesteps.repeat(2), noise(4, 5, 16, seed=1)
    batches = []
    ours.conv_in.register_forward_pre_hook(lambda layer, inputs: batches.append(inputs[0].shape[0]))
    expected = reference(x, t, text).sample
    torch.testing.assert_close(ours(x, t, text), expected, rtol=0, atol=1e-5)
    patched = {"patches": {"input_block_patch": [lambda hidden, options: hidden]}}
    torch.testing.assert_close(ours(x, t, text, transformer_options=patched), expected, rtol=0, atol=1e-5)
    assert batches == [6, 12]


def test_distinct_clips():
    x, t = noise(1, 4, 2, 3, 3).repeat(2, 1, 1, 1, 1), torch.tensor([3.0, 3.0])
    assert distinct_clips(x, t, {}) == 1
    assert distinct_clips(x, t, {"patches": {}}) == 1
    assert distinct_clips(x[:1], t[:1], {}) == 1
    assert distinct_clips(x + noise(2, 1, 1, 1, 1), t, {}) == 2
    assert distinct_clips(x, torch.tensor([3.0, 4.0]), {}) == 2
    assert distinct_clips(x, t, {"patches_replace": {"attn1": {}}}) == 2
    assert distinct_clips(torch.cat((x, x[:1])), torch.full((3,), 3.0), {}) == 3
