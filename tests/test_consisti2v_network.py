"""ConsistI2V's network: the numbers of the original, its published keys, and what ComfyUI does with it.

`goldens/consisti2v_A` holds a small random state dict and what the original class computes with it at 6 frames;
`ORIGINAL_OUTPUTS` are values of the same class for other clips. `data/consisti2v_keys.json` lists the parameters of
that class at its published configuration: tables of parameter name -> shape, each with the modules that have this
table.
"""

import json
import math
import zlib
from pathlib import Path

import comfy.ops
import comfy.patcher_extension
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import pad, scaled_dot_product_attention

from consistent_video.loaders.network import build_on_meta, compare, load_network
from consistent_video.models import consisti2v_unet
from consistent_video.models.consisti2v_attention import (
    FirstFrameAttention,
    RotaryEmbedding,
    TemporalAttention,
    TemporalTextAttention,
    neighbours,
    rotate,
)
from consistent_video.models.consisti2v_layers import TemporalResnet, TemporalTransformer
from consistent_video.models.consisti2v_unet import ConsistI2VUNet, drop_dead_keys
from consistent_video.models.unet3d import REPLACEMENTS

KEYS_FILE = Path(__file__).parent / "data" / "consisti2v_keys.json"
GOLDENS = Path(__file__).parent / "goldens" / "consisti2v_A"
CONFIG = json.loads((GOLDENS / "unet_config.json").read_text(encoding="utf-8"))
TOLERANCE = 2e-5
# (frames, height, width): every (size / 8)-th value of frames 2.., the mean of their absolute values; see `clip`.
ORIGINAL_OUTPUTS = {
    (5, 8, 8): ([-0.083011, 0.291655, 0.099987, -0.112522, -0.382994, 0.023801, 0.803484, -0.595159], 0.261606),
    (16, 8, 6): ([0.132622, 0.002018, -0.076123, 0.016271, 0.111992, -0.002517, -0.116066, 0.003938], 0.27184),
    (24, 6, 8): ([-0.01118, -0.02397, -0.046718, -0.051128, 0.366047, -0.315538, -0.335419, 0.245345], 0.250749),
    (5, 7, 9): ([0.188622, -0.121125, -0.065122, -0.092443, 0.158532, -0.230106, 0.020946, -0.212214], 0.258261),
    (2, 6, 6): ([0.537538, -0.268345, -0.097214, -0.13966, -0.095637, 0.085767, -0.455887, -0.076339], 0.246053),
}
TEXT_LAYERS = [32, 32, 64, 32, 32, 32, 32]


def waves(name, *shape):
    """Values that follow from a name without a random generator: the same everywhere."""
    steps = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(steps * 12.9898 + zlib.crc32(name.encode()) % 1000) * 1.4).reshape(shape).float()


def clip(frames, height, width):
    """Two clips with all that the network takes besides."""
    return {
        "x": waves("sample", 2, 4, frames, height, width),
        "timesteps": torch.tensor([301, 801]),
        "context": waves("text", 2, 7, 24),
        "first_frame_latents": waves("first", 2, 4, 1, height, width),
        "frame_stride": torch.tensor([2, 5]),
    }


def load(dtype=torch.float32, operations=comfy.ops.disable_weight_init, **config):
    network = build_on_meta(ConsistI2VUNet, {**CONFIG, **config}, "unet_config.json")
    state = drop_dead_keys(load_file(GOLDENS / "unet.safetensors"))
    return load_network(network, state, dtype, operations, REPLACEMENTS, "unet.safetensors")


@pytest.fixture(scope="module")
def network():
    return load()


@pytest.fixture(scope="module")
def goldens():
    return {
        key.removeprefix("forward."): tensor
        for key, tensor in load_file(GOLDENS / "tensors.safetensors").items()
        if key.startswith("forward.")
    }


@pytest.fixture(scope="module")
def published():
    """The original's state dict at full size, without storage."""
    return {
        f"{module}.{name}": torch.empty([int(size) for size in shape.split("x")], device="meta")
        for table in json.loads(KEYS_FILE.read_text(encoding="utf-8"))
        for module in table["modules"]
        for name, shape in table["parameters"].items()
    }


def predict(network, goldens, timestep, dtype=torch.float32):
    """What the network predicts for the golden clip; index 0 of its input is filled with a value it must not see."""
    first = goldens["first_frame_latents"]
    return network(
        torch.cat((torch.full_like(first, 1000.0), goldens["sample"]), dim=2).to(dtype),
        torch.full((2,), timestep),
        goldens["encoder_hidden_states"].to(dtype),
        first_frame_latents=first,
        frame_stride=json.loads((GOLDENS / "meta.json").read_text(encoding="utf-8"))["frame_stride"],
    )


@pytest.mark.parametrize("timestep", [1, 451, 981])
def test_output_of_the_original_network(network, goldens, timestep):
    result = predict(network, goldens, timestep)
    assert result.shape == (2, 4, 6, 8, 8) and torch.equal(result[:, :, 0], torch.zeros(2, 4, 8, 8))
    assert (result[:, :, 1:] - goldens[f"out_t{timestep}"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("size", ORIGINAL_OUTPUTS)
def test_output_of_the_original_network_for_other_clips(network, size):
    result = network(**clip(*size))[:, :, 1:].flatten()
    values, mean = ORIGINAL_OUTPUTS[size]
    found = result[:: result.numel() // 8][:8]
    assert (found - torch.tensor(values)).abs().max() < TOLERANCE
    assert result.abs().mean().item() == pytest.approx(mean, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("weights", "computation", "tolerance"),
    [
        (torch.float16, torch.float32, 4e-3),
        (torch.float16, torch.float16, 8e-3),
        (torch.bfloat16, torch.bfloat16, 6e-2),
        (torch.float8_e4m3fn, torch.float32, 0.3),
    ],
)
def test_cast_weights_stay_near_the_original(goldens, weights, computation, tolerance):
    network = load(weights, comfy.ops.manual_cast)
    assert network.conv_in.weight.dtype == weights
    result = predict(network, goldens, 451, computation)
    assert result.dtype == computation
    assert (result[:, :, 1:].float() - goldens["out_t451"]).abs().max() < tolerance


def test_published_size_is_accounted_for_key_by_key(published):
    network = build_on_meta(ConsistI2VUNet, {}, "published")
    assert len(published) == 1397 and sum(tensor.numel() for tensor in published.values()) == 1_249_975_241
    live = drop_dead_keys(published)
    assert not compare(live, network)
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == 1_239_625_481
    dead = published.keys() - live.keys()
    temporal = {key for key in published if ".conv3ds." in key and "time_emb_proj" in key}
    biases = {key for key in published if "relative_attention_bias" in key}
    assert dead == temporal | biases and len(temporal) == 44 and len(biases) == 30
    assert {tuple(published[key].shape) for key in biases} == {(32, 8)}


def test_text_keys_and_values_can_be_projected_once(network):
    inputs = clip(5, 8, 8)
    projected = network.project_text(inputs["context"])
    assert projected.shape == (2, 7, 2 * sum(TEXT_LAYERS))
    attention = network.down_blocks[0].tempo_attns[0].transformer_blocks[0].attn2
    values = torch.nn.functional.linear(inputs["context"], attention.to_v.weight)
    assert (projected[..., 96:128] - values).abs().max() < 1e-6
    expected = network(**inputs)
    assert torch.equal(network(**{**inputs, "context": None, "text_keys_values": projected}), expected)


def test_text_keys_have_no_position(network):
    inputs = clip(7, 8, 8)
    assert inputs["context"].shape[1] == 7
    twice = {**inputs, "context": inputs["context"].repeat(1, 2, 1)}
    assert (network(**twice) - network(**inputs)).abs().max() < 1e-5


def test_clips_of_a_batch_do_not_see_each_other(network):
    inputs = clip(5, 8, 8)
    both = network(**inputs)
    for index in range(2):
        alone = network(**{key: value[index : index + 1] for key, value in inputs.items()})
        assert (alone - both[index : index + 1]).abs().max() < 1e-5


def test_guided_batches_repeat_the_clip_and_its_first_frame(network):
    inputs = {key: value[:1].repeat(2, *[1] * (value.ndim - 1)) for key, value in clip(5, 8, 8).items()}
    inputs["context"] = clip(5, 8, 8)["context"]
    both = network(**inputs)
    one_by_one = [network(**{key: value[i : i + 1] for key, value in inputs.items()}) for i in range(2)]
    assert (both - torch.cat(one_by_one)).abs().max() < 1e-5 and (both[0] - both[1]).abs().max() > 1e-3
    inputs["frame_stride"] = torch.tensor([2, 5])
    assert (network(**inputs)[1] - both[1]).abs().max() > 1e-3
    inputs["first_frame_latents"] = torch.cat((inputs["first_frame_latents"][:1], -inputs["first_frame_latents"][1:]))
    assert (network(**inputs)[0] - both[0]).abs().max() < 1e-5


def test_first_frame_may_come_in_the_clip_or_for_all_clips(network):
    inputs = clip(5, 8, 8)
    first = inputs["first_frame_latents"][:1]
    shared = network(**{**inputs, "first_frame_latents": first})
    inputs["x"][:, :, :1] = first
    assert torch.equal(network(**{**inputs, "first_frame_latents": None}), shared)


def test_frame_stride_is_a_number_or_one_per_clip_and_three_by_default(network):
    inputs = clip(5, 8, 8)
    default = network(**{**inputs, "frame_stride": None})
    for same in (3, torch.tensor([3]), torch.tensor(3.0), torch.tensor([3, 3])):
        assert torch.equal(network(**{**inputs, "frame_stride": same}), default)
    assert (network(**{**inputs, "frame_stride": 1}) - default).abs().max() > 1e-3


def test_single_frame_predicts_nothing(network):
    assert torch.equal(network(**clip(1, 8, 8)), torch.zeros(2, 4, 1, 8, 8))


def test_attention_backend_sees_first_frame_keys(network):
    calls = []

    def record(function, queries, keys, *args, **kwargs):
        calls.append((tuple(queries.shape), keys.shape[1], kwargs["attn_precision"]))
        return function(queries, keys, *args, **kwargs)

    inputs = clip(5, 8, 6)
    result = network(**inputs, transformer_options={"optimized_attention_override": record})
    assert (result - network(**inputs)).abs().max() < 1e-5
    assert len(calls) == 2 * len(TEXT_LAYERS)
    assert calls[:4] == [
        ((10, 48, 32), 96, torch.float32),
        ((2, 240, 32), 7, torch.float32),
        ((96, 5, 32), 13, torch.float32),
        ((2, 240, 32), 7, torch.float32),
    ]


def test_first_frame_is_projected_once(network):
    rows = []
    attentions = [network.down_blocks[0].attentions[0], network.down_blocks[0].tempo_attns[0]]
    layers = [getattr(t.transformer_blocks[0].attn1, name) for t in attentions for name in ("to_k", "to_v")]
    hooks = [
        layer.register_forward_hook(lambda _, given, __: rows.append(given[0].numel() // given[0].shape[-1]))
        for layer in layers
    ]
    network(**clip(5, 8, 6))
    for hook in hooks:
        hook.remove()
    assert rows == [2 * 5 * 48] * 4


def test_block_patches_and_wrappers_apply(network):
    seen = []

    def input_patch(hidden, options):
        seen.append((*options["block"], tuple(hidden.shape)))
        return hidden

    def output_patch(hidden, skip, options):
        seen.append((*options["block"], hidden.shape[1], skip.shape[1]))
        return hidden, skip * (0 if options["block"][1] == 0 else 1)

    def wrapper(executor, *args, **kwargs):
        return executor(*args, **kwargs) + 5

    options = {
        "patches": {"input_block_patch": [input_patch], "output_block_patch": [output_patch]},
        "wrappers": {comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL: {None: [wrapper]}},
    }
    inputs = clip(2, 8, 8)
    result, plain = network(**inputs, transformer_options=options), network(**inputs)
    assert torch.equal(result[:, :, 0], torch.full((2, 4, 8, 8), 5.0))
    assert (result - 5 - plain)[:, :, 1:].abs().max() > 1e-3
    assert seen == [
        ("input", 0, (4, 32, 8, 8)),
        ("input", 1, (4, 32, 8, 8)),
        ("input", 2, (4, 32, 4, 4)),
        ("input", 3, (4, 64, 4, 4)),
        ("output", 0, 64, 64),
        ("output", 1, 64, 32),
        ("output", 2, 64, 32),
        ("output", 3, 32, 32),
    ]


def test_neighbours_are_the_replicated_window_without_its_centre():
    height, width = 3, 5
    numbers = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    windows = pad(numbers, (1, 1, 1, 1), mode="replicate").unfold(2, 3, 1).unfold(3, 3, 1)
    expected = windows.reshape(-1, 9)[:, [0, 1, 2, 3, 5, 6, 7, 8]]
    assert torch.equal(neighbours(height, width, torch.device("cpu")).float(), expected)


def test_rotation_is_that_of_complex_numbers():
    embedding, tokens = RotaryEmbedding(16), waves("tokens", 3, 6, 16)
    assert embedding.freqs.tolist() == pytest.approx([1.0, 0.1, 0.01, 0.001])
    rotated = rotate(tokens, *embedding(tokens))
    pairs = torch.view_as_complex(tokens[..., :8].unflatten(-1, (4, 2)))
    angles = torch.arange(6)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    expected = torch.view_as_real(pairs * torch.exp(1j * angles)).flatten(-2)
    assert (rotated[..., :8] - expected).abs().max() < 1e-6
    assert torch.equal(rotated[..., 8:], tokens[..., 8:])


def reference_attention(layer, queries, keys, values):
    """Multi-head attention of (L, C) over (S, C), projected."""
    split = [part.unflatten(-1, (layer.heads, -1)).transpose(0, 1) for part in (queries, keys, values)]
    return layer.to_out[0](scaled_dot_product_attention(*split).transpose(0, 1).flatten(1))


def test_spatial_attention_frame_by_frame():
    layer, tokens = FirstFrameAttention(16, 2), waves("tokens", 2, 3, 4, 16)
    result = layer(tokens)
    for index in range(2):
        for frame in range(3):
            seen = torch.cat((tokens[index, frame], tokens[index, 0]))
            expected = reference_attention(layer, layer.to_q(tokens[index, frame]), layer.to_k(seen), layer.to_v(seen))
            assert (result[index, frame] - expected).abs().max() < 1e-5


def test_temporal_attention_pixel_by_pixel():
    layer, tokens = TemporalAttention(16, 2), waves("tokens", 2, 12, 5, 16)
    window = neighbours(3, 4, tokens.device)
    result, alone = layer(tokens, window), layer(tokens, None)
    for index in range(2):
        for pixel in range(12):
            own = tokens[index, pixel]
            around = tokens[index, window[pixel], 0]
            turns = layer.rotary_emb(own)
            keys = torch.cat((rotate(layer.to_k(own), *turns), layer.to_k(around)))
            values = layer.to_v(torch.cat((own, around)))
            queries = rotate(layer.to_q(own), *turns)
            expected = reference_attention(layer, queries, keys, values)
            assert (result[index, pixel] - expected).abs().max() < 1e-5
            expected = reference_attention(layer, queries, keys[:5], values[:5])
            assert (alone[index, pixel] - expected).abs().max() < 1e-5


def test_temporal_text_attention_pixel_by_pixel():
    layer, tokens = TemporalTextAttention(16, 2, 24), waves("tokens", 2, 12, 5, 16)
    text = waves("text", 2, 7, 24)
    result = layer(tokens, (layer.to_k(text), layer.to_v(text)))
    for index in range(2):
        for pixel in range(12):
            own = tokens[index, pixel]
            queries = rotate(layer.to_q(own), *layer.rotary_emb(own))
            expected = reference_attention(layer, queries, layer.to_k(text[index]), layer.to_v(text[index]))
            assert (result[index, pixel] - expected).abs().max() < 1e-5


def test_alpha_leaves_out_a_share_between_none_and_all():
    layer, hidden = TemporalResnet(32), waves("hidden", 6, 32, 2, 2)
    results = {}
    for alpha in (-0.5, 0.0, 0.25, 1.0, 1.5):
        layer.alpha.data.fill_(alpha)
        results[alpha] = layer(hidden, 2)
    change = results[0.0] - hidden
    assert change.abs().max() > 0.1
    assert torch.equal(results[-0.5], results[0.0])
    assert torch.equal(results[1.0], hidden) and torch.equal(results[1.5], hidden)
    assert (results[0.25] - (hidden + 0.75 * change)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("first_frame_condition_mode", "conv2d"),
        ("temp_pos_embedding", "sinusoidal"),
        ("use_temporal", False),
        ("use_linear_projection", False),
        ("down_block_types", ["CrossAttnDownBlock2D"]),
        ("up_block_types", ["UpBlock2D", "AttnUpBlock2D"]),
        ("attention_head_dim", [2]),
    ],
)
def test_configuration_of_another_network_is_named(field, value):
    with pytest.raises(ValueError, match=f"unet/config.json .*{field}.*Restore"):
        build_on_meta(ConsistI2VUNet, {**CONFIG, field: value}, "unet/config.json")


def test_network_without_frame_stride_or_window():
    network = build_on_meta(
        ConsistI2VUNet, {"use_frame_stride_condition": False, "augment_temporal_attention": False}, "config"
    )
    assert not [key for key in network.state_dict() if key.startswith("frame_stride_embedding")]
    assert network.down_blocks[0].tempo_attns[0].window is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_rotary_frequencies_keep_their_precision(network, dtype):
    stored = load(dtype, comfy.ops.manual_cast).state_dict()
    frequencies = [key for key in stored if key.endswith("rotary_emb.freqs")]
    assert len(frequencies) == 6
    assert all(torch.equal(stored[key], network.state_dict()[key]) for key in frequencies)
    assert {value.dtype for key, value in stored.items() if value.ndim > 1} == {dtype}


def test_windows_are_computed_once_for_every_size(network, monkeypatch):
    sizes = []

    def count(height, width, device):
        sizes.append((height, width))
        return neighbours(height, width, device)

    monkeypatch.setattr(consisti2v_unet, "neighbours", count)
    network(**clip(5, 8, 6))
    layers = [module for module in network.modules() if isinstance(module, TemporalTransformer)]
    assert len(layers) > len(sizes) == len(set(sizes)) > 0
