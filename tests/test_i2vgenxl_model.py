"""The I2VGen-XL MODEL in ComfyUI: what is computed once per run is never stale, bad input is named."""

import comfy.hooks
import comfy.model_management
import comfy.samplers
import pytest
import torch
from safetensors.torch import load_file
from test_i2vgenxl_parity import noise_of, picture_of

from consistent_video.loaders import assembly, checkpoint, network, single_file
from consistent_video.loaders.families import I2VGENXL, MODELSCOPE
from consistent_video.models.i2vgenxl import IMAGE_EMBEDDING
from consistent_video.models.i2vgenxl_conditioning import condition_prompts
from consistent_video.samplers import reference, schedules
from native_sampling import conditioning, sample

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded(i2vgenxl_folder):
    parts = checkpoint.load_folder(I2VGENXL, i2vgenxl_folder, "default")
    return (*parts, checkpoint.load_folder_vision(i2vgenxl_folder, "default"))


@pytest.fixture(scope="module")
def unet_state(i2vgenxl_folder):
    return load_file(i2vgenxl_folder / "unet" / "diffusion_pytorch_model.safetensors")


def prompts(loaded, pictures, text="a boat", fps=16, size=(64, 64)):
    _, clip, vae, vision = loaded
    return condition_prompts(
        conditioning(clip, text), conditioning(clip, ""), vae, vision, pictures, *size, fps, encoding="mode"
    )


def run(loaded, seed=0, model=None, noise=None, hooks=None, **kwargs):
    pictures = torch.stack([picture_of(64, 64, seed=seed)])
    both = prompts(loaded, pictures, **kwargs)
    if hooks is not None:
        both = [[[text, {**extra, "hooks": hooks}] for text, extra in prompt] for prompt in both]
    model = loaded[0] if model is None else model
    noise = noise_of(1, 4, 4, 8, 8) if noise is None else noise
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, 2)
    return sample(model, *both, noise, reference.reference_sampler(), sigmas, cfg=7.0)


def lora_of(key, width):
    generator = torch.Generator().manual_seed(2)
    up, down = (0.3 * torch.randn(*shape, generator=generator) for shape in ((width, 2), (2, width)))
    name = f"lora_unet_{key.replace('.', '_')}"
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}, up @ down


KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


def test_picture_fps_and_text_never_come_from_another_run(loaded):
    first = run(loaded)
    others = [run(loaded, seed=3), run(loaded, fps=4), run(loaded, text="a red car")]
    assert all((other - first).abs().max() > 1e-3 for other in others)
    assert torch.equal(run(loaded), first)


def test_lora_and_clone_never_see_each_others_context(loaded, i2vgenxl_folder, unet_state):
    lora, delta = lora_of(KEY, 64)
    state = dict(unet_state)
    state[f"{KEY}.weight"] = state[f"{KEY}.weight"] + delta
    by_hand = assembly.load_folder_network(I2VGENXL, i2vgenxl_folder, "default")
    by_hand.model.diffusion_model.load_state_dict(state, assign=True)
    expected, plain = run(loaded, model=by_hand), run(loaded)
    import comfy.sd

    patched = comfy.sd.load_lora_for_models(loaded[0], None, lora, 1.0, 0)[0]
    assert (run(loaded, model=patched) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.equal(run(loaded), plain)
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    hooked = run(loaded, model=loaded[0].clone(), hooks=hooks)
    assert (hooked - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - plain).abs().max() > 1e-3


def test_an_embedding_per_frame_is_taken_and_equal_ones_change_nothing(loaded):
    positive, negative = prompts(loaded, torch.stack([picture_of(64, 64)]))
    noise, sampler = noise_of(1, 4, 4, 8, 8), reference.reference_sampler()
    sigmas = schedules.reference_sigmas(loaded[0].model.scheduler_config, 2)
    shared = sample(loaded[0], positive, negative, noise, sampler, sigmas)
    embedding = positive[0][1][IMAGE_EMBEDDING].expand(-1, 4, -1)
    per_frame = [[positive[0][0], {**positive[0][1], IMAGE_EMBEDDING: embedding}]]
    assert (sample(loaded[0], per_frame, negative, noise, sampler, sigmas) - shared).abs().max() < 1e-3
    moving = [[positive[0][0], {**positive[0][1], IMAGE_EMBEDDING: embedding * torch.arange(4).view(1, 4, 1)}]]
    assert (sample(loaded[0], moving, negative, noise, sampler, sigmas) - shared).abs().max() > 1e-2


@pytest.mark.parametrize("scheduler", ["normal", "karras", "simple", "sgm_uniform"])
def test_native_schedules_are_finite_at_zero_signal(loaded, scheduler):
    sampling = loaded[0].get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, scheduler, 4)
    assert sigmas.isfinite().all() and sampling.sigma_max == pytest.approx(4518.76, rel=1e-4)
    both = prompts(loaded, torch.stack([picture_of(64, 64)]))
    result = sample(loaded[0], *both, noise_of(1, 4, 4, 8, 8), comfy.samplers.sampler_object("euler"), sigmas)
    assert result.isfinite().all()


def test_native_cfg_rescale_applies(loaded):
    from comfy_extras.nodes_model_advanced import RescaleCFG

    patched = RescaleCFG().patch(loaded[0], 0.7)[0]
    result = run(loaded, model=patched)
    assert result.isfinite().all() and (result - run(loaded)).abs().max() > 1e-3


def test_published_size_is_accounted_for_key_by_key():
    published = network.build_on_meta(I2VGENXL.network, {"num_attention_heads": 64}, "published")
    state = published.state_dict()
    assert single_file.detect_family(state) is I2VGENXL
    rebuilt = network.build_on_meta(I2VGENXL.network, single_file.network_config(I2VGENXL, state), "")
    assert not network.compare(state, rebuilt)
    assert sum(value.numel() for value in state.values()) == 1_420_469_224


def test_single_file_of_each_family_is_recognised(models_folder, unet_state):
    from safetensors.torch import save_file

    path = models_folder / "diffusion_models" / "i2vgenxl.safetensors"
    save_file(unet_state, path)
    loaded = single_file.load_file(path, "auto", "default")
    assert type(loaded.model).__name__ == "I2VGenXLModel"
    with pytest.raises(ValueError, match="not a network of ModelScope text-to-video: found I2VGen-XL"):
        single_file.load_file(path, MODELSCOPE.name, "default")
    path.unlink()


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (torch.zeros(0, 64, 64, 3), "image batch is empty"),
        (torch.zeros(1, 1, 1, 3), "1x1 pixels"),
        (torch.zeros(1, 64, 64, 5), "5 channels"),
        (torch.full((1, 64, 64, 3), float("nan")), "NaN or infinite"),
    ],
)
def test_pictures_that_cannot_be_encoded_are_named(loaded, picture, words):
    with pytest.raises(ValueError, match=words):
        prompts(loaded, picture)


def test_missing_picture_wrong_size_and_wrong_encoders_are_named(loaded):
    clip = loaded[1]
    noise, sampler = noise_of(1, 4, 4, 8, 8), reference.reference_sampler()
    sigmas = schedules.reference_sigmas(loaded[0].model.scheduler_config, 1)
    plain = conditioning(clip, "a boat")
    good = prompts(loaded, torch.stack([picture_of(64, 64)]))
    extra = good[0][0][1]
    cases = [
        ((plain, plain), "connect both prompts through I2VGen-XL Conditioning"),
        (prompts(loaded, torch.stack([picture_of(64, 64)]), size=(64, 72)), "prepared for latents of \\(9, 8\\)"),
        (([[good[0][0][0], {**extra, IMAGE_EMBEDDING: torch.zeros(1, 1, 768)}]], good[1]), "embeds a picture in 768"),
        (([[torch.zeros(1, 77, 768), extra]], good[1]), "has 768 values per token"),
        (([[good[0][0][0], {**extra, IMAGE_EMBEDDING: torch.zeros(1, 3, 64)}]], good[1]), "has 3 frames"),
    ]
    for both, words in cases:
        with pytest.raises(ValueError, match=words):
            sample(loaded[0], *both, noise, sampler, sigmas)


def test_frames_decode_to_the_same_pixels_in_any_split_within_the_memory_given(loaded, monkeypatch):
    vae, clip = loaded[2], noise_of(1, 4, 16, 8, 8)
    memory = vae.memory_used_decode((1, 4, 8, 8), vae.vae_dtype)
    decode, sizes = vae.first_stage_model.decode, []
    monkeypatch.setattr(
        vae.first_stage_model, "decode", lambda z, **kwargs: (sizes.append(len(z)), decode(z, **kwargs))[1]
    )
    results = []
    for budget in (1, 4, 16):
        sizes.clear()
        free = (budget + 0.5) * memory
        monkeypatch.setattr(vae.patcher, "get_free_memory", lambda device, free=free: free)
        results.append(vae.decode(clip))
        assert max(sizes) * memory <= free and sum(sizes) == 16
    assert all((result - results[0]).abs().max() < 1e-5 for result in results)
