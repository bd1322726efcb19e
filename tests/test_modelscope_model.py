"""The ModelScope MODEL as a citizen of ComfyUI: types, streaming, LoRA, caches that nobody sees, previews, memory."""

import gc
import weakref

import comfy.hooks
import comfy.model_management
import comfy.ops
import comfy.samplers
import pytest
import torch
from diffusers import UNet3DConditionModel
from safetensors.torch import load_file, save_file

import nodes
from consistent_video.loaders import assembly, checkpoint, lora
from consistent_video.loaders.families import MODELSCOPE
from consistent_video.models.latent_format import FrameLatentFormat, frame_grid
from consistent_video.samplers import latents, reference, schedules
from native_sampling import conditioning, sample

pytestmark = pytest.mark.slow

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
TEMPORAL = "up_blocks.1.temp_attentions.0.transformer_blocks.0.attn1"
LAYERS = (f"{ATTENTION}.to_k", f"{ATTENTION}.to_out.0", f"{TEMPORAL}.to_v")


@pytest.fixture(scope="module")
def loaded(modelscope_folder):
    return checkpoint.load_folder(MODELSCOPE, modelscope_folder, "default")


@pytest.fixture(scope="module")
def unet_state(modelscope_folder):
    return load_file(modelscope_folder / "unet" / "diffusion_pytorch_model.safetensors")


def noise_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(model, clip, prompt="a cat", noise=None, steps=2, negative=None, **kwargs):
    noise = noise_of(1, 4, 3, 8, 8) if noise is None else noise
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, steps)
    sampler = reference.reference_sampler()
    positive = prompt if isinstance(prompt, list) else conditioning(clip, prompt)
    negative = conditioning(clip, "") if negative is None else negative
    return sample(model, positive, negative, noise, sampler, sigmas, cfg=7.0, **kwargs)


def diffusers_unet(folder, state):
    unet = UNet3DConditionModel.from_config(UNet3DConditionModel.load_config(folder / "unet"))
    unet.load_state_dict(state)
    return unet.eval()


# Types and streaming


def test_fp16_weights_compute_in_fp32(modelscope_folder, unet_state):
    model = assembly.load_folder_network(MODELSCOPE, modelscope_folder, "fp16").model
    assert (model.get_dtype(), model.manual_cast_dtype) == (torch.float16, torch.float32)
    rounded = diffusers_unet(modelscope_folder, {key: value.half().float() for key, value in unet_state.items()})
    x, text, timesteps = noise_of(2, 4, 5, 8, 8), noise_of(2, 77, 64, seed=1), torch.tensor([10.0, 700.0])
    expected = rounded(x, timesteps, text, return_dict=False)[0]
    assert (model.diffusion_model(x, timesteps, text) - expected).abs().max() < 1e-5


def test_streamed_layers_compute_the_same(loaded):
    model = loaded[0].clone()
    x, text, sigma = noise_of(1, 4, 5, 8, 8), noise_of(1, 77, 64, seed=1), torch.tensor([3.0])
    expected = model.model.apply_model(x, sigma, c_crossattn=text)
    layers = [layer for layer in model.model.diffusion_model.modules() if hasattr(layer, "comfy_cast_weights")]
    for layer in layers:
        layer.comfy_cast_weights = True
    try:
        streamed = model.model.apply_model(x, sigma, c_crossattn=text)
    finally:
        for layer in layers:
            layer.comfy_cast_weights = False
    assert len(layers) > 200
    assert torch.equal(streamed, expected)


def test_every_parameter_belongs_to_a_layer_that_can_stream(loaded):
    network = loaded[0].model.diffusion_model
    owners = [layer for layer in network.modules() if next(layer.parameters(recurse=False), None) is not None]
    assert [type(layer).__name__ for layer in owners if not hasattr(layer, "comfy_cast_weights")] == []


def test_low_vram_patching_with_a_lora_equals_full_patching(loaded, lora_file):
    patched = nodes.LoraLoaderModelOnly().load_lora_model_only(loaded[0], lora_file("kohya"), 1.0)[0]
    x, text, sigma = noise_of(1, 4, 5, 8, 8), noise_of(1, 77, 64, seed=1), torch.tensor([3.0])
    results = []
    for budget in (0, 1):
        patched.patch_model(comfy.model_management.get_torch_device(), lowvram_model_memory=budget)
        results.append(patched.model.apply_model(x, sigma, c_crossattn=text))
        patched.unpatch_model(patched.offload_device)
    assert (results[0] - results[1]).abs().max() < 1e-5
    assert (results[0] - loaded[0].model.apply_model(x, sigma, c_crossattn=text)).abs().max() > 1e-3


# LoRA


@pytest.fixture
def lora_file(models_folder):
    """Writes a LoRA of rank 2, alpha 4 in a trainer's format; returns its name."""
    written = []

    def write(layout):
        tensors = {}
        for key, (up, down) in lora_matrices().items():
            names = {
                "kohya": (f"lora_unet_{key.replace('.', '_')}.lora_up.weight", ".lora_up.", ".lora_down."),
                "generic": (f"diffusion_model.{key}.lora_B.weight", ".lora_B.", ".lora_A."),
                "peft": (f"unet.{key}.lora_B.weight", ".lora_B.", ".lora_A."),
                "diffusers": (f"unet.{key}.lora.up.weight", ".lora.up.", ".lora.down."),
                "processor": (processor_name(key), "_lora.up.", "_lora.down."),
            }
            name, up_part, down_part = names[layout]
            tensors |= {name: up, name.replace(up_part, down_part): down}
            tensors[f"{name.split(up_part)[0]}.alpha"] = torch.tensor(4.0)
        path = models_folder / "loras" / f"{layout}.safetensors"
        save_file(tensors, path)
        written.append(path)
        return path.name

    yield write
    for path in written:
        path.unlink()


def processor_name(key):
    parent, layer = key.removesuffix(".0").rsplit(".", 1)
    return f"unet.{parent}.processor.{layer}_lora.up.weight"


def lora_matrices():
    generator = torch.Generator().manual_seed(7)
    shapes = {LAYERS[0]: (64, 64), LAYERS[1]: (64, 64), LAYERS[2]: (128, 128)}
    return {
        key: (0.3 * torch.randn(rows, 2, generator=generator), 0.3 * torch.randn(2, columns, generator=generator))
        for key, (rows, columns) in shapes.items()
    }


@pytest.fixture(scope="module")
def with_lora_by_hand(modelscope_folder, unet_state, loaded):
    """Latents of the network whose weights were changed by hand: W + strength * alpha / rank * up @ down."""
    state = dict(unet_state)
    for key, (up, down) in lora_matrices().items():
        state[f"{key}.weight"] = state[f"{key}.weight"] + 0.5 * (4.0 / 2.0) * up @ down
    by_hand = assembly.load_folder_network(MODELSCOPE, modelscope_folder, "default")
    by_hand.model.diffusion_model.load_state_dict(state, assign=True)
    return run(by_hand, loaded[1])


@pytest.mark.parametrize("layout", ["kohya", "generic", "peft", "diffusers", "processor"])
def test_native_lora_loader_changes_the_clip_as_computed_by_hand(loaded, lora_file, with_lora_by_hand, layout, caplog):
    model, clip, _ = loaded
    lora.register()
    plain = run(model, clip)
    patched = nodes.LoraLoaderModelOnly().load_lora_model_only(model, lora_file(layout), 0.5)[0]
    assert len(patched.patches) == len(LAYERS)
    assert "not loaded" not in caplog.text.lower()
    assert (run(patched, clip) - with_lora_by_hand).abs().max() < 1e-5 * with_lora_by_hand.abs().max()
    assert (plain - with_lora_by_hand).abs().max() > 1e-2
    assert torch.equal(run(model, clip), plain)


def test_registering_twice_adds_one_format_and_other_networks_are_left_alone():
    import comfy.weight_adapter

    lora.register()
    lora.register()
    assert comfy.weight_adapter.adapters.count(lora.DiffusersLoRAAdapter) == 1
    file = {"unet.blocks.0.lora_B.weight": torch.zeros(2, 2), "unet.blocks.0.lora_A.weight": torch.zeros(2, 2)}
    assert lora.DiffusersLoRAAdapter.load("diffusion_model.blocks.0", file, None, None) is None


def test_scheduled_lora_hooks_are_never_stale(loaded, lora_file, with_lora_by_hand):
    model, clip, _ = loaded
    tensors = load_file(nodes.folder_paths.get_full_path("loras", lora_file("kohya")))
    hooks = comfy.hooks.create_hook_lora(tensors, 0.5, 0.0)

    def hooked(text):
        return [[cond, {**extra, "hooks": hooks}] for cond, extra in conditioning(clip, text)]

    result = run(model.clone(), clip, hooked("a cat"), negative=hooked(""))
    assert (result - with_lora_by_hand).abs().max() < 1e-5 * with_lora_by_hand.abs().max()
    assert (run(model, clip) - with_lora_by_hand).abs().max() > 1e-2


# What is computed once per run stays within the run


def test_prompts_do_not_leak_between_runs(loaded):
    model, clip, _ = loaded
    first = run(model, clip, "a cat")
    second = run(model, clip, "a red car on the moon")
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(run(model, clip, "a cat"), first)


def test_batch_equals_single_clips(loaded):
    model, clip, _ = loaded
    noise = noise_of(2, 4, 3, 8, 8)
    both = run(model, clip, noise=noise)
    singles = torch.cat([run(model, clip, noise=noise[index : index + 1]) for index in range(2)])
    assert (both - singles).abs().max() < 1e-5 * singles.abs().max()


def test_prompts_of_different_length_share_a_batch(loaded):
    model, clip, _ = loaded
    long = "a panda, " * 60
    positive, negative = conditioning(clip, long), conditioning(clip, "blurry")
    assert positive[0][0].shape[1] > negative[0][0].shape[1]
    noise, sigmas = noise_of(1, 4, 3, 8, 8), schedules.reference_sigmas(model.model.scheduler_config, 2)
    together = sample(model, positive, negative, noise, reference.reference_sampler(), sigmas)
    x, sigma = noise_of(1, 4, 3, 8, 8), torch.tensor([2.0])
    repeated = positive[0][0].repeat(1, 2, 1)
    assert torch.isfinite(together).all()
    once, twice = (model.model.apply_model(x, sigma, c_crossattn=text) for text in (positive[0][0], repeated))
    assert (once - twice).abs().max() < 1e-4


def test_inputs_are_not_changed(loaded):
    model, clip, _ = loaded
    positive, noise = conditioning(clip, "a cat"), noise_of(1, 4, 3, 8, 8)
    before, text = noise.clone(), positive[0][0].clone()
    options = dict(model.model_options)
    run(model, clip, positive, noise)
    assert torch.equal(noise, before) and torch.equal(positive[0][0], text)
    assert positive[0][1].keys() == conditioning(clip, "a cat")[0][1].keys()
    assert model.model_options == options and not model.patches


# Native samplers, patches, masks


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "uni_pc", "lcm", "heun"])
def test_native_samplers_run(loaded, name):
    model, clip, _ = loaded
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 2)
    noise = noise_of(1, 4, 3, 8, 8)
    result = sample(model, conditioning(clip, "a cat"), [], noise, comfy.samplers.sampler_object(name), sigmas, cfg=1.0)
    assert torch.isfinite(result).all() and result.shape == noise.shape


def test_noise_mask_keeps_the_unmasked_region(loaded):
    model, clip, _ = loaded
    latent = noise_of(1, 4, 3, 8, 8, seed=9)
    mask = torch.zeros(1, 1, 3, 8, 8)
    mask[..., 4:] = 1
    result = run(model, clip, latent=latent, denoise_mask=mask)
    assert (result[..., :4] - latent[..., :4]).abs().max() < 1e-5
    assert (result[..., 4:] - latent[..., 4:]).abs().max() > 1e-2


def test_block_patches_are_called_as_for_image_networks(loaded):
    model, clip, _ = loaded
    patched, seen = model.clone(), []

    def scale(h, skip, options):
        seen.append(options["block"])
        return h * 1.5, skip

    patched.set_model_output_block_patch(scale)
    assert (run(patched, clip) - run(model, clip)).abs().max() > 1e-2
    assert seen[:3] == [("output", 0), ("output", 1), ("output", 2)]


# Previews, latents, VAE, memory


def test_previews_show_every_frame():
    clip = torch.arange(5.0).view(1, 1, 5, 1, 1).expand(2, 4, 5, 2, 3)
    grid = frame_grid(clip)
    assert grid.shape == (1, 4, 4, 9)
    assert grid[0, 0, ::2, ::3].tolist() == [[0, 1, 2], [3, 4, 0]]
    assert FrameLatentFormat().latent_rgb_factors_reshape is frame_grid


def test_latent_scale_is_the_folders(loaded, modelscope_folder):
    assert loaded[0].model.latent_format.scale_factor == 0.18215
    assert loaded[0].model.process_latent_in(torch.ones(1)).item() == pytest.approx(0.18215)


def test_empty_latents_have_the_vaes_shape(loaded):
    latent = latents.empty_latent(loaded[2], 64, 40, 5, 2)
    assert latent["samples"].shape == (2, 4, 5, 5, 8) and not latent["samples"].any()


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((250, 64, 5), "width 250 is not a multiple of 8. Use 248 or 256."),
        ((64, 7, 5), "height 7 is not a multiple of 8. Use 8 or 16."),
        ((64, 64, 0), "frames 0 is outside 1..512"),
        ((64, 64, 1000), "frames 1000 is outside 1..512"),
    ],
)
def test_impossible_sizes_are_named(loaded, size, words):
    with pytest.raises(ValueError) as caught:
        latents.empty_latent(loaded[2], *size)
    assert words in str(caught.value)


def test_vae_handles_clips_images_and_tiles(loaded):
    vae = loaded[2]
    clips = noise_of(2, 4, 3, 6, 5)
    images = vae.decode(clips)
    assert images.shape == (2, 3, 48, 40, 3)
    single = vae.decode(clips[1, :, 2].unsqueeze(0))
    assert (images[1, 2] - single[0]).abs().max() < 1e-5
    tiled = vae.decode_tiled(clips, tile_x=64, tile_y=64, overlap=16, tile_t=8, overlap_t=4)
    assert (tiled - images).abs().max() < 1e-5
    pixels = torch.rand(3, 48, 40, 3, generator=torch.Generator().manual_seed(0))
    encoded = vae.encode(pixels)
    assert encoded.shape == (1, 4, 3, 6, 5)
    assert (vae.encode(pixels[2:])[0, :, 0] - encoded[0, :, 2]).abs().max() < 1e-5
    assert (vae.encode_tiled(pixels, tile_x=512, tile_y=512, overlap=64) - encoded).abs().max() < 1e-4


def test_vae_splits_frames_by_free_memory(loaded, monkeypatch):
    vae, clip = loaded[2], noise_of(1, 4, 7, 8, 8)
    expected = vae.decode(clip)
    sizes, decode = [], vae.first_stage_model.decode
    monkeypatch.setattr(
        vae.first_stage_model, "decode", lambda z, **kwargs: (sizes.append(z.shape[0]), decode(z, **kwargs))[1]
    )
    memory = vae.memory_used_decode((1, 4, 8, 8), vae.vae_dtype)
    monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device: 3.5 * memory)
    assert (vae.decode(clip) - expected).abs().max() < 1e-5
    assert sizes == [3, 3, 1]


def test_unloaded_models_are_freed(modelscope_folder):
    model, clip, vae = checkpoint.load_folder(MODELSCOPE, modelscope_folder, "default")
    vae.decode(run(model, clip))
    alive = [weakref.ref(part) for part in (model.model, clip.cond_stage_model, vae.first_stage_model)]
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models]
    assert all(patcher in loaded for patcher in (clip.patcher, vae.patcher))
    comfy.model_management.unload_all_models()
    assert comfy.model_management.current_loaded_models == []
    del model, clip, vae, loaded
    gc.collect()
    assert [reference() for reference in alive] == [None, None, None]
