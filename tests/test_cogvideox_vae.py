"""The CogVideoX VAE: equal to diffusers' chunk by chunk, native nodes, tiles, memory, damaged folders."""

import gc
import json
import shutil
import weakref

import comfy.model_management
import comfy.ops
import pytest
import torch
from activation_memory import ActivationPeak
from diffusers import AutoencoderKLCogVideoX
from safetensors.torch import load_file, save_file
from tiny_cogvideox import PUBLISHED_VAE, tiny_vae, write_vae

import nodes
from consistent_video.loaders.cogvideox_vae import latent_scales, load_cogvideox_vae
from consistent_video.loaders.network import build_on_meta
from consistent_video.models.adopt import adopt
from consistent_video.models.cogvideox_vae_chunks import ChunkedAutoencoder, chunk_bounds, replacements
from consistent_video.models.cogvideox_vae_memory import memory_functions

pytestmark = pytest.mark.slow

THREE_LEVELS = {
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CogVideoXDownBlock3D",) * 3,
    "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    "latent_channels": 4,
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("consisid")
    write_vae(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def vae(checkpoint_folder):
    return load_cogvideox_vae(checkpoint_folder)


@pytest.fixture(scope="module")
def reference():
    return tiny_vae()


def noise_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images_of(*shape, seed=0):
    return torch.rand((*shape, 3), generator=torch.Generator().manual_seed(seed))


def smooth_latents(*shape):
    """Latents that change as slowly over the picture as those of a photograph."""
    batch, channels, frames, height, width = shape
    coarse = noise_of(batch * channels, frames, height // 4, width // 4)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear").view(shape)


def pixels_to_network(images):
    return (images * 2 - 1).movedim(-1, 0)[None]


# Numbers


@pytest.mark.parametrize(
    ("frames", "size", "bounds"),
    [
        (1, 2, [(0, 1)]),
        (2, 2, [(0, 2)]),
        (4, 2, [(0, 2), (2, 4)]),
        (13, 2, [(0, 3), (3, 5), (5, 7), (7, 9), (9, 11), (11, 13)]),
        (5, 8, [(0, 5)]),
        (13, 8, [(0, 13)]),
        (17, 8, [(0, 9), (9, 17)]),
    ],
)
def test_the_first_chunk_takes_the_remainder(frames, size, bounds):
    assert chunk_bounds(frames, size) == bounds


@pytest.mark.parametrize("frames", [1, 5, 9, 13, 17, 49])
def test_encoding_is_the_references(vae, reference, frames):
    images = images_of(frames, 32, 40)
    posterior = reference.encode(pixels_to_network(images)).latent_dist
    encoded = vae.encode(images)
    assert encoded.shape == (1, 16, (frames - 1) // 4 + 1, 4, 5)
    assert (encoded - posterior.mode()).abs().max() < 2e-5
    drawn = posterior.sample(torch.Generator().manual_seed(7))
    assert (vae.encode_sample(images, 7) - drawn).abs().max() < 5e-5
    assert (vae.encode_sample(images, 8) - drawn).abs().max() > 1e-2


@pytest.mark.parametrize("frames", [1, 3, 5, 7, 9, 11, 13])
def test_decoding_an_odd_number_of_latents_is_the_references(vae, reference, frames):
    latents = noise_of(1, 16, frames, 4, 5)
    images = vae.first_stage_model.decode(latents)
    assert images.shape == (1, 3, 4 * (frames - 1) + 1, 32, 40)
    assert (images - reference.decode(latents).sample).abs().max() < 1e-5
    shown = vae.decode(latents)
    assert (shown - ((images + 1) / 2).clamp(0, 1).movedim(1, -1)).abs().max() < 1e-6


@pytest.mark.parametrize("frames", [2, 4, 12])
def test_an_even_number_of_latents_gives_the_same_count_rule(vae, reference, frames):
    latents = noise_of(1, 16, frames, 4, 5)
    images, published = vae.first_stage_model.decode(latents), reference.decode(latents).sample
    assert images.shape[2] == 4 * (frames - 1) + 1 and published.shape[2] == 4 * frames
    later = (images[:, :, -4:] - published[:, :, -4:]).abs().mean()
    assert later < 0.1 * images[:, :, -4:].std()


def test_the_first_of_an_even_number_of_latents_is_one_image(vae):
    """With norms that ignore what surrounds them, causality alone decides: the first image is that of the latent."""
    network = vae.first_stage_model
    latents = noise_of(1, 16, 4, 4, 5)
    norms = [module for module in network.decoder.modules() if isinstance(module, torch.nn.GroupNorm)]
    handles = [norm.register_forward_hook(lambda module, inputs, output: inputs[0].clone()) for norm in norms]
    try:
        alone, pair, all_four = (network.decode(latents[:, :, :count]) for count in (1, 2, 4))
    finally:
        for handle in handles:
            handle.remove()
    scale = alone.abs().max()
    assert (pair[:, :, :1] - alone).abs().max() < 1e-4 * scale
    assert (all_four[:, :, :5] - pair).abs().max() < 1e-4 * scale


def test_convolutions_in_slices_change_nothing(vae, monkeypatch):
    latents, images = noise_of(1, 16, 5, 4, 5), images_of(13, 32, 40)
    whole = vae.decode(latents), vae.encode(images)
    for elements in (1, 3 * 16 * 32 * 40):
        monkeypatch.setattr("consistent_video.models.cogvideox_vae_chunks.CONVOLUTION_ELEMENTS", elements)
        assert (vae.decode(latents) - whole[0]).abs().max() < 1e-5
        assert (vae.encode(images) - whole[1]).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("settings", "space", "time"),
    [
        ({"temporal_compression_ratio": 2}, 8, 2),
        (THREE_LEVELS, 4, 4),
        ({"layers_per_block": 2, "act_fn": "gelu"}, 8, 4),
    ],
)
def test_the_configuration_decides(tmp_path, settings, space, time):
    write_vae(tmp_path / "vae", config={"a_future_field": 1}, **settings)
    vae, reference = load_cogvideox_vae(tmp_path), tiny_vae(**settings)
    images = images_of(2 * time + 1, 8 * space, 4 * space)
    latents = vae.encode(images)
    assert latents.shape == (1, settings.get("latent_channels", 16), 3, 8, 4)
    assert (latents - reference.encode(pixels_to_network(images)).latent_dist.mode()).abs().max() < 2e-5
    assert (vae.first_stage_model.decode(latents) - reference.decode(latents).sample).abs().max() < 5e-5
    assert (vae.temporal_compression_decode(), vae.spacial_compression_decode()) == (time, space)


def test_latent_scales_are_the_folders(checkpoint_folder, tmp_path):
    assert latent_scales(checkpoint_folder) == (0.7, 0.7)
    write_vae(tmp_path / "vae", invert_scale_latents=True)
    assert latent_scales(tmp_path) == (0.7, pytest.approx(1 / 0.7))


# ComfyUI's nodes


def test_native_nodes_take_clips(vae):
    latents = noise_of(2, 16, 3, 8, 10)
    before = latents.clone()
    images = nodes.VAEDecode().decode(vae, {"samples": latents})[0]
    assert images.shape == (18, 64, 80, 3) and torch.equal(latents, before)
    assert (images[9:] - vae.decode(latents[1:])[0]).abs().max() < 1e-5
    tiled = nodes.VAEDecodeTiled().decode(vae, {"samples": latents}, 64, 16, 8, 4)[0]
    assert tiled.shape == images.shape
    encoded = nodes.VAEEncode().encode(vae, images[:9])[0]["samples"]
    assert encoded.shape == (1, 16, 3, 8, 10)
    tiled = nodes.VAEEncodeTiled().encode(vae, images[:9], 64, 16, 8, 4)[0]["samples"]
    assert tiled.shape == encoded.shape
    assert (vae.encode(images.view(2, 9, 64, 80, 3))[:1] - encoded).abs().max() < 1e-4


def test_what_does_not_fit_is_cropped_as_by_comfyui(vae):
    images = torch.cat([images_of(8, 35, 44), torch.ones(8, 35, 44, 1)], dim=-1)
    fitting = vae.encode(images[:5, 1:33, 2:42, :3])
    assert fitting.shape == (1, 16, 2, 4, 5)
    assert (vae.encode(images) - fitting).abs().max() < 1e-5
    assert (vae.encode_tiled(images) - fitting).abs().max() < 1e-5
    with pytest.raises(ValueError, match="no frames"):
        vae.encode(images[:0])


@pytest.mark.parametrize("shape", [(1, 4, 3, 8, 8), (1, 16, 8, 8), (1, 16, 0, 8, 8)])
def test_foreign_latents_are_refused(vae, shape):
    for decode in (vae.decode, vae.decode_tiled):
        with pytest.raises(ValueError, match="batch, 16, frames, height, width") as caught:
            decode(torch.zeros(shape))
        assert str(shape) in str(caught.value)


def test_one_tile_is_the_whole_picture(vae):
    latents, images = noise_of(1, 16, 4, 4, 6), images_of(9, 32, 48)
    decoded, encoded = vae.decode(latents), vae.encode(images)
    # Tiles in time would change the result; the request for them is ignored.
    assert (
        vae.decode_tiled(latents, tile_x=64, tile_y=64, overlap=8, tile_t=2, overlap_t=1) - decoded
    ).abs().max() < 1e-5
    assert (
        vae.encode_tiled(images, tile_x=64, tile_y=64, overlap=8, tile_t=8, overlap_t=4) - encoded
    ).abs().max() < 1e-5


def test_tiles_are_as_close_as_the_references_and_blend(vae):
    reference = tiny_vae()
    latents = smooth_latents(1, 16, 2, 16, 24)[:, :, :1]
    plain = vae.decode(latents)
    tiled = vae.decode_tiled(latents, tile_x=8, tile_y=8, overlap=2)
    reference.enable_tiling(64, 64, 1 / 4, 1 / 4)
    published = ((reference.decode(latents).sample + 1) / 2).clamp(0, 1).movedim(1, -1)
    assert (tiled - plain).abs().mean() <= 1.1 * (published - plain).abs().mean()

    def steps(images, columns):
        return (images[..., columns, :] - images[..., [column - 1 for column in columns], :]).abs().mean()

    # Tiles start at columns 48, 96 and 144 and end 16 columns later.
    seams = [48, 64, 96, 112, 144, 160]
    assert steps(tiled, seams) < 1.3 * steps(plain, seams)
    hard = vae.decode_tiled(latents, tile_x=8, tile_y=8, overlap=0)
    assert steps(hard, [64, 128]) > 1.3 * steps(plain, [64, 128])


# Memory


@pytest.mark.parametrize(
    ("size", "dtype"),
    [((60, 90), torch.bfloat16), ((60, 90), torch.float32), ((32, 32), torch.float16), ((96, 170), torch.bfloat16)],
)
def test_memory_estimate_is_what_the_published_network_uses(published, size, dtype):
    decoding, encoding = memory_functions(PUBLISHED_VAE)
    network = published.to(dtype)
    for frames in (1, 2, 3, 4, 5, 6, 9):
        with torch.device("meta"):
            latents = torch.empty(1, 16, frames, *size, dtype=dtype)
            images = torch.empty(1, 3, 4 * frames - 3, 8 * size[0], 8 * size[1], dtype=dtype)
        with ActivationPeak() as decoded:
            assert network.decode(latents).shape == images.shape
        with ActivationPeak() as encoded:
            assert network.encode(images).shape == latents.shape
        # with room for workspaces
        assert 1.1 <= decoding(latents.shape, dtype) / decoded.peak < 1.25
        assert 1.1 <= encoding(images.shape, dtype) / encoded.peak < 1.25


@pytest.fixture(scope="module")
def published():
    network = build_on_meta(ChunkedAutoencoder, PUBLISHED_VAE, "config.json")
    return adopt(network, comfy.ops.disable_weight_init, replacements(comfy.ops.disable_weight_init))


def test_a_published_clip_in_tiles_fits_five_gigabytes(published):
    weights = 2 * sum(parameter.numel() for parameter in published.parameters())
    decoding, _ = memory_functions(PUBLISHED_VAE)
    whole = decoding((1, 16, 13, 60, 90), torch.bfloat16) + weights
    assert 8e9 < whole < 9e9
    for tile, limit in ((32, 2.4e9), (48, 4e9), (54, 5e9)):
        assert decoding((1, 16, 13, min(60, tile), tile), torch.bfloat16) + weights < limit


def test_amd_cards_get_comfyuis_factor(published, monkeypatch):
    shape, functions = (1, 16, 13, 60, 90), memory_functions(PUBLISHED_VAE)
    plain = [memory_used(shape, torch.bfloat16) for memory_used in functions]
    monkeypatch.setattr(comfy.model_management, "is_amd", lambda: True)
    on_amd = [memory_used(shape, torch.bfloat16) for memory_used in functions]
    assert on_amd == pytest.approx([2.73 * memory for memory in plain])


def test_half_of_the_references_memory(published):
    reference = build_on_meta(AutoencoderKLCogVideoX, PUBLISHED_VAE, "config.json").to(torch.bfloat16)
    latents = torch.empty(1, 16, 13, 60, 90, dtype=torch.bfloat16, device="meta")
    peaks = []
    for network in (published.to(torch.bfloat16), reference):
        with ActivationPeak() as activations:
            network.decode(latents)
        peaks.append(activations.peak)
    assert peaks[0] < 0.5 * peaks[1]


def test_tiles_reserve_the_memory_of_a_tile(vae, monkeypatch):
    asked = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda models, memory_required=0, **kwargs: (asked.append(memory_required), load(models, **kwargs)),
    )
    vae.decode_tiled(noise_of(1, 16, 3, 12, 16), tile_x=8, tile_y=8, overlap=2)
    vae.encode_tiled(images_of(5, 96, 128), tile_x=64, tile_y=64, overlap=16)
    tile = (
        vae.memory_used_decode((1, 16, 3, 8, 8), vae.vae_dtype),
        vae.memory_used_encode((1, 3, 5, 64, 64), vae.vae_dtype),
    )
    assert asked == list(tile)


def test_clips_of_a_batch_are_split_by_free_memory(vae, monkeypatch):
    latents = noise_of(5, 16, 2, 4, 4)
    expected = vae.decode(latents)
    sizes, decode = [], vae.first_stage_model.decode
    monkeypatch.setattr(vae.first_stage_model, "decode", lambda z: (sizes.append(z.shape[0]), decode(z))[1])
    memory = vae.memory_used_decode((1, 16, 2, 4, 4), vae.vae_dtype)
    monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: 2.5 * memory)
    assert (vae.decode(latents) - expected).abs().max() < 1e-5
    assert sizes == [2, 2, 1]


def test_weights_can_stream_and_be_half_precision(checkpoint_folder, vae, monkeypatch):
    """Every layer with weights fetches them through ComfyUI, and computes in the type of its input."""
    layers = [
        module for module in vae.first_stage_model.modules() if any(True for _ in module.parameters(recurse=False))
    ]
    assert layers and all(isinstance(layer, comfy.ops.CastWeightBiasOp) for layer in layers)
    latents = noise_of(1, 16, 3, 4, 4)
    expected = vae.decode(latents)
    monkeypatch.setattr(comfy.model_management.args, "bf16_vae", True)
    half = load_cogvideox_vae(checkpoint_folder)
    assert {parameter.dtype for parameter in half.first_stage_model.parameters()} == {torch.bfloat16}
    assert (half.decode(latents).float() - expected).abs().mean() < 0.02
    for layer in half.first_stage_model.modules():
        if hasattr(layer, "comfy_cast_weights"):
            layer.comfy_cast_weights = True
    half.vae_dtype = torch.float32
    assert (half.decode(latents) - expected).abs().mean() < 0.02


def test_an_interrupt_stops_between_chunks(vae, monkeypatch):
    chunks, decoder = [], vae.first_stage_model.decoder

    def interrupt(module, inputs):
        chunks.append(inputs[0].shape[2])
        comfy.model_management.interrupt_current_processing(len(chunks) == 2)

    handle = decoder.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            vae.decode(noise_of(1, 16, 13, 4, 4))
    finally:
        handle.remove()
    assert chunks == [3, 2]


def test_an_unloaded_vae_is_freed(checkpoint_folder):
    vae = load_cogvideox_vae(checkpoint_folder)
    vae.decode_tiled(noise_of(1, 16, 2, 4, 4))
    network = weakref.ref(vae.first_stage_model)
    comfy.model_management.unload_all_models()
    del vae
    gc.collect()
    assert network() is None


# Files


def test_every_published_key_is_the_references(published):
    expected = {
        key: value.shape for key, value in build_on_meta(AutoencoderKLCogVideoX, PUBLISHED_VAE, "").state_dict().items()
    }
    found = {key: value.shape for key, value in published.state_dict().items()}
    assert found == expected and len(found) == 436
    assert sum(shape.numel() for shape in found.values()) == 215_583_907


@pytest.fixture
def copy(checkpoint_folder, tmp_path):
    return shutil.copytree(checkpoint_folder, tmp_path / "copy")


def rewrite(folder, change):
    path = folder / "vae" / WEIGHTS
    state = load_file(path)
    change(state)
    save_file(state, path)


def reconfigure(folder, **fields):
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **fields}), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda folder: rewrite(folder, lambda state: state.pop("decoder.conv_in.conv.bias")),
            [WEIGHTS, "1 missing keys (decoder.conv_in.conv.bias)"],
        ),
        (
            lambda folder: rewrite(folder, lambda state: state.update({"decoder.extra": torch.zeros(1)})),
            [WEIGHTS, "1 unexpected keys (decoder.extra)"],
        ),
        (
            lambda folder: reconfigure(folder, latent_channels=8),
            [WEIGHTS, "tensors of another shape", "expected (64, 8, 1, 1, 1)"],
        ),
        (
            lambda folder: reconfigure(folder, _class_name="AutoencoderKL"),
            ["config.json", "AutoencoderKL", "vae folder"],
        ),
        (lambda folder: reconfigure(folder, down_block_types=["Other"] * 4), ["config.json", "working network"]),
        (lambda folder: (folder / "vae" / WEIGHTS).write_bytes(b"\xff" * 64), [WEIGHTS, "damaged or incomplete"]),
        (lambda folder: (folder / "vae" / WEIGHTS).unlink(), ["No weights", "Download"]),
        (lambda folder: (folder / "vae" / "config.json").unlink(), ["config.json is missing"]),
    ],
)
def test_damage_is_named(copy, damage, words):
    damage(copy)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_cogvideox_vae(copy)
    message = str(caught.value)
    assert str(copy) in message and [word for word in words if word not in message] == []


def test_half_files_load(copy, vae):
    rewrite(copy, lambda state: state.update({key: value.bfloat16() for key, value in state.items()}))
    latents = noise_of(1, 16, 3, 4, 4)
    assert (load_cogvideox_vae(copy).decode(latents) - vae.decode(latents)).abs().mean() < 0.02


@pytest.mark.parametrize("draw", [False, True])
def test_out_of_memory_encodes_in_tiles(vae, monkeypatch, draw):
    clip = torch.rand(1, 64, 320, 3, generator=torch.Generator().manual_seed(1))
    encode = (lambda: vae.encode_sample(clip, 3)) if draw else (lambda: vae.encode(clip))
    expected, moments, calls = encode(), vae.first_stage_model.moments, []

    def fails_once(images):
        calls.append(images.shape[-1])
        if len(calls) == 1:
            raise torch.OutOfMemoryError("simulated")
        return moments(images)

    monkeypatch.setattr(vae.first_stage_model, "moments", fails_once)
    found = encode()
    assert len(calls) > 2 and max(calls[1:]) < 320
    assert found.shape == expected.shape and (found - expected).abs().mean() < 0.2 * expected.abs().mean()
