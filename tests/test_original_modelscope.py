"""The original ModelScope checkpoint layout: every published key and shape, and the numbers of the original network.

`data/original_modelscope_keys.json` lists the parameters of the original `UNetSD` at its published configuration, read
from that class: tables of parameter name -> shape, each with the modules that have this table.
"""

import json
import math
import zlib
from pathlib import Path

import pytest
import torch
from diffusers import UNet3DConditionModel

from consistent_video.loaders import single_file
from consistent_video.loaders.original_modelscope import convert, is_original_modelscope, key_map

KEYS_FILE = Path(__file__).parent / "data" / "original_modelscope_keys.json"
# More channels than the 32 norm groups: with one channel each, the norms would take out biases and the time embedding.
TINY = {"block_out_channels": (64, 128), "layers_per_block": 1, "down_attention": (True, False)}
# Every 96th value; see test_output_of_the_original_network.
ORIGINAL_OUTPUT = [0.55480123, 0.47006966, 0.61364241, 0.75810963, 0.83281869, 1.03586615, 1.07042022, 1.09224501]
LAYOUTS = [
    TINY,
    {"block_out_channels": (32, 32, 64), "layers_per_block": 2, "down_attention": (True, True, False)},
    {"block_out_channels": (32,), "layers_per_block": 2, "down_attention": (True,)},
    {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "down_attention": (False, True, True, True)},
]


@pytest.fixture(scope="module")
def published():
    """The original's state dict at full size, without storage."""
    return {
        f"{module}.{name}": torch.empty([int(size) for size in shape.split("x")], dtype=torch.float16, device="meta")
        for table in json.loads(KEYS_FILE.read_text(encoding="utf-8"))
        for module in table["modules"]
        for name, shape in table["parameters"].items()
    }


def shapes(state):
    return {key: tuple(value.shape) for key, value in state.items()}


def network(block_out_channels, layers_per_block, down_attention):
    """A small diffusers network; 1024 text channels, because the original's decoder knows no other width."""
    return UNet3DConditionModel(
        block_out_channels=block_out_channels,
        layers_per_block=layers_per_block,
        down_block_types=["CrossAttnDownBlock3D" if has else "DownBlock3D" for has in down_attention],
        up_block_types=["CrossAttnUpBlock3D" if has else "UpBlock3D" for has in reversed(down_attention)],
        attention_head_dim=16,
        cross_attention_dim=1024,
    ).eval()


def values(key, shape):
    """Float64 values that follow from the original key without a random generator: the same everywhere."""
    waves = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 12.9898 + zlib.crc32(key.encode()) % 1000)
    spread = waves.reshape(shape) / math.sqrt(math.prod(shape[1:]))
    return spread * 0.3 + 1 if len(shape) == 1 and key.endswith("weight") else spread


def original_state(layout, expected):
    """A small state dict in the original layout: temporal projections are convolutions there."""
    state = {}
    for old, new in key_map(**layout).items():
        shape = tuple(expected[new].shape)
        temporal = new.startswith("transformer_in.") or ".temp_attentions." in new
        convolution = temporal and old.endswith((".proj_in.weight", ".proj_out.weight"))
        state[old] = values(old, (*shape, 1) if convolution else shape)
    return state


@pytest.fixture
def tiny():
    return original_state(TINY, network(**TINY).state_dict())


def test_published_layout_becomes_the_diffusers_layout(published):
    with torch.device("meta"):
        expected = UNet3DConditionModel().state_dict()
    assert len(published) == 1480
    assert shapes(convert(published)) == shapes(expected)


def test_default_key_map_lists_the_published_keys_once(published):
    names = key_map()
    assert set(names) == set(published)
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("input_blocks.0.1.norm.bias", "transformer_in.norm.bias"),
        ("input_blocks.5.0.out_layers.3.weight", "down_blocks.1.resnets.1.conv2.weight"),
        ("input_blocks.8.2.proj_in.weight", "down_blocks.2.temp_attentions.1.proj_in.weight"),
        ("input_blocks.9.op.weight", "down_blocks.2.downsamplers.0.conv.weight"),
        ("middle_block.3.temopral_conv.conv4.3.bias", "mid_block.temp_convs.1.conv4.3.bias"),
        ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
        ("output_blocks.8.3.conv.bias", "up_blocks.2.upsamplers.0.conv.bias"),
        (
            "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight",
            "up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_k.weight",
        ),
    ],
)
def test_places(old, new):
    assert key_map()[old] == new


@pytest.mark.parametrize("layout", LAYOUTS)
def test_depth_is_read_from_the_keys(layout):
    expected = network(**layout).state_dict()
    assert shapes(convert(original_state(layout, expected))) == shapes(expected)


def test_output_of_the_original_network(tiny):
    """Numbers of the original `UNetSD` (dim 64, dim_mult 1 and 2, one block, 8 heads of 16, attention at scale 1).

    In float64: these weights amplify the rounding of fp32. What remains is that of the timestep's fp32 sinusoids.
    """
    unet = network(**TINY).double()
    unet.load_state_dict(convert(tiny))
    sample = values("sample", (1, 4, 3, 8, 8)) * math.sqrt(4 * 3 * 8 * 8)
    text = values("text", (1, 5, 1024)) * math.sqrt(5 * 1024)
    output = unet(sample, torch.tensor([321]), text).sample
    assert output.shape == sample.shape
    expected = torch.tensor(ORIGINAL_OUTPUT, dtype=torch.float64)
    torch.testing.assert_close(output.flatten()[::96], expected, atol=1e-5, rtol=0)


def test_values_stay_where_they_are(tiny):
    names = key_map(**TINY)
    converted = convert(tiny)
    assert len(converted) == len(tiny)
    for old, value in tiny.items():
        assert converted[names[old]].data_ptr() == value.data_ptr()
        assert torch.equal(converted[names[old]].flatten(), value.flatten())


def test_half_precision_stays(tiny):
    converted = convert({key: value.half() for key, value in tiny.items()})
    assert {value.dtype for value in converted.values()} == {torch.float16}


def test_projections_may_be_stored_either_way(tiny):
    """Spatial projections as 1x1 convolutions and temporal ones as matrices lead to the same network."""
    projections = (".proj_in.weight", ".proj_out.weight")
    matrices = {key: value.squeeze(-1) if key.endswith(projections) else value for key, value in tiny.items()}
    kernels = {key: value[..., None, None] if key.endswith(projections) else value for key, value in matrices.items()}
    expected = shapes(convert(tiny))
    assert shapes(matrices) != shapes(tiny)
    assert shapes(convert(matrices)) == expected
    assert shapes(convert(kernels)) == expected


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "unet.", "state_dict.model.diffusion_model."])
def test_common_prefix_is_taken_off(tiny, prefix):
    prefixed = {prefix + key: value for key, value in tiny.items()}
    assert is_original_modelscope(prefixed)
    converted = convert(prefixed)
    expected = convert(tiny)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], expected[key]) for key in expected)


def test_recognition(published):
    assert is_original_modelscope(published)
    assert is_original_modelscope(key for key in published)
    assert not is_original_modelscope([])
    assert not is_original_modelscope(key_map().values())


def test_image_networks_are_not_taken_for_it(published):
    """A Stable Diffusion UNet has no temporal layers."""
    assert not is_original_modelscope(key for key in published if "temopral_conv" not in key)


@pytest.mark.parametrize("name", ["local_image_concat.0.weight", "pre_image_condition.0.weight"])
def test_relatives_are_not_taken_for_it(published, name):
    assert not is_original_modelscope([*published, name])
    assert not is_original_modelscope([f"unet.{key}" for key in [*published, name]])


def test_unknown_keys_are_named(tiny):
    extra = {
        name: torch.zeros(1) for name in ("fps_embedding.0.weight", "input_blocks.1.0.gate", "input_blocks.77.op.bias")
    }
    names = "fps_embedding.0.weight, input_blocks.1.0.gate, input_blocks.77.op.bias"
    with pytest.raises(ValueError, match=rf"clip.pth has keys .*\(3 of .*{names}\. "):
        convert({**tiny, **extra}, "clip.pth")


def test_many_unknown_keys_are_cut(tiny):
    extra = {f"extra.{number}": torch.zeros(1) for number in range(9)}
    with pytest.raises(ValueError, match=r"\(9 of .*: extra\.0, .*extra\.4, \.\.\."):
        convert({**tiny, **extra})


def test_keys_outside_the_prefix_are_unknown(tiny):
    prefixed = {f"unet.{key}": value for key, value in tiny.items()}
    with pytest.raises(ValueError, match=r"\(1 of .*: out\.2\.bias\. "):
        convert({**prefixed, "out.2.bias": tiny["out.2.bias"]})


def test_another_layout_is_refused(tiny):
    with pytest.raises(ValueError, match=r"not an original ModelScope .*found conv_in\.bias, conv_in\.weight"):
        convert(convert(tiny))


def test_missing_width_is_named(tiny):
    del tiny["input_blocks.3.0.out_layers.0.weight"]
    with pytest.raises(ValueError, match=r"lacks the keys input_blocks\.3\.0\.out_layers\.0\.weight"):
        convert(tiny)


def test_other_missing_keys_are_left_out(tiny):
    del tiny["input_blocks.3.0.in_layers.2.weight"]
    assert key_map(**TINY).keys() - tiny.keys() == {"input_blocks.3.0.in_layers.2.weight"}
    assert "down_blocks.1.resnets.0.conv1.weight" not in convert(tiny)


def test_loader_reads_the_configuration_of_a_converted_file(tiny):
    state = single_file.network_keys(tiny, "clip.pth")
    assert single_file.detect_family(state).name == "modelscope"
    config = single_file.network_config(single_file.detect_family(state), state)
    assert config["block_out_channels"] == [64, 128]
    assert config["layers_per_block"] == 1
    assert config["down_block_types"] == ["CrossAttnDownBlock3D", "DownBlock3D"]
    assert config["cross_attention_dim"] == 1024
