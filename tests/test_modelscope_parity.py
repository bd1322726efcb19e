"""ModelScope in ComfyUI against the published pipelines: same tiny weights, same noise."""

import comfy.samplers
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, TextToVideoSDPipeline, VideoToVideoSDPipeline
from exact import in_float64

from consistent_video.loaders import assembly, checkpoint
from consistent_video.loaders.families import MODELSCOPE
from consistent_video.samplers import reference, schedules
from native_sampling import conditioning, sample

PROMPT = "a panda surfing a wave"
NEGATIVE = "blurry, text"
SCALE = 0.18215


@pytest.fixture(scope="module")
def pipeline(modelscope_folder):
    pipeline = TextToVideoSDPipeline.from_pretrained(modelscope_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def loaded(modelscope_folder):
    return checkpoint.load_folder(MODELSCOPE, modelscope_folder, "default")


@pytest.fixture(scope="module")
def exact_pipeline(modelscope_folder):
    """The pipeline in float64."""
    pipeline = TextToVideoSDPipeline.from_pretrained(modelscope_folder, torch_dtype=torch.float64)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def exact(loaded, modelscope_folder):
    """MODEL, CLIP and VAE, the network in float64."""
    return in_float64(assembly.load_folder_network(MODELSCOPE, modelscope_folder, "default")), *loaded[1:]


def noise_of(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(loaded, noise, steps=10, sampler=None, sigmas=None, negative=NEGATIVE, **kwargs):
    model, clip, _ = loaded
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, steps) if sigmas is None else sigmas
    sampler = reference.reference_sampler() if sampler is None else sampler
    return sample(model, conditioning(clip, PROMPT), conditioning(clip, negative), noise, sampler, sigmas, **kwargs)


def run_pipeline(pipeline, noise, steps=10, **kwargs):
    prompt = None if "prompt_embeds" in kwargs else [PROMPT] * noise.shape[0]
    settings = {
        "guidance_scale": 9.0,
        "negative_prompt": [NEGATIVE] * noise.shape[0],
        "output_type": "latent",
        **kwargs,
    }
    return pipeline(prompt, num_inference_steps=steps, latents=noise, num_frames=noise.shape[2], **settings).frames


@pytest.mark.parametrize("text", ["", PROMPT, "a cat, " * 20])
def test_encoded_text_equals_transformers(pipeline, loaded, text):
    tokens = pipeline.tokenizer(text, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    expected = pipeline.text_encoder(tokens.input_ids)[0]
    assert (loaded[1].encode(text) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("shape", [(1, 4, 16, 8, 8), (2, 4, 5, 6, 10), (1, 4, 1, 8, 8), (1, 4, 24, 5, 7)])
def test_one_call_of_the_network_equals_diffusers(exact_pipeline, exact, shape):
    x, text = noise_of(*shape).double(), noise_of(shape[0], 77, 64, seed=1).double()
    timesteps = torch.tensor([481.0, 20.0][: shape[0]])
    expected = exact_pipeline.unet(x, timesteps, text, return_dict=False)[0]
    network = exact[0].model.diffusion_model
    assert (network(x, timesteps, text) - expected).abs().max() < 1e-10
    assert (network(x, timesteps, None, text_keys_values=network.project_text(text)) - expected).abs().max() < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 4, 16, 4, 6), (2, 4, 3, 6, 8), (1, 4, 24, 2, 6)])
def test_ten_ddim_steps_equal_the_pipeline(exact_pipeline, exact, shape):
    """From the same encoded prompts: that the text encoders agree is another test."""
    noise = noise_of(*shape)
    texts = [conditioning(exact[1], text)[0][0].double().repeat(len(noise), 1, 1) for text in (PROMPT, NEGATIVE)]
    prompts = {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "negative_prompt": None}
    expected = run_pipeline(exact_pipeline, noise.double(), **prompts)
    latents = run(exact, noise)
    assert (latents * SCALE - expected).abs().max() < 1e-4
    frames = exact[2].decode(latents)
    decoded = exact_pipeline.decode_latents(expected).movedim(1, -1)
    assert (frames - (decoded / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-3
    assert frames.std() > 0.01


def test_without_guidance_one_branch_equals_the_pipeline(pipeline, loaded):
    noise = noise_of(1, 4, 5, 8, 8)
    expected = run_pipeline(pipeline, noise, guidance_scale=1.0, negative_prompt=None)
    assert (run(loaded, noise, cfg=1.0) * SCALE - expected).abs().max() < 1e-4


@pytest.mark.slow
def test_dpm_solver_schedule_and_native_dpmpp_2m_equal_the_pipeline(pipeline, loaded):
    scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    other = TextToVideoSDPipeline(**{**pipeline.components, "scheduler": scheduler})
    other.set_progress_bar_config(disable=True)
    noise = noise_of(1, 4, 8, 8, 8)
    expected = run_pipeline(other, noise, 25)
    config = {**loaded[0].model.scheduler_config, "_class_name": "DPMSolverMultistepScheduler"}
    sigmas = schedules.reference_sigmas(config, 25)
    latents = run(loaded, noise, sampler=comfy.samplers.sampler_object("dpmpp_2m"), sigmas=sigmas)
    assert (latents * SCALE - expected).norm() / expected.norm() < 1e-3


@pytest.mark.slow
def test_video_to_video_equals_the_pipeline(pipeline, loaded):
    video = VideoToVideoSDPipeline(**pipeline.components)
    video.set_progress_bar_config(disable=True)
    model, _, vae = loaded
    images = torch.rand(5, 64, 48, 3, generator=torch.Generator().manual_seed(3))
    latent = vae.encode(images)
    noise = noise_of(*latent.shape, seed=4)
    encoded = pipeline.vae.encode(images.movedim(-1, 1) * 2 - 1).latent_dist.mode().unflatten(0, (1, 5)).movedim(1, 2)
    assert (latent - encoded).abs().max() < 1e-4
    video.prepare_latents = lambda _, timestep, *args, **kwargs: video.scheduler.add_noise(
        encoded * SCALE, noise, timestep
    )
    expected = video(
        PROMPT,
        video=list(images.numpy()),
        strength=0.6,
        num_inference_steps=10,
        guidance_scale=15.0,
        negative_prompt=NEGATIVE,
        output_type="latent",
    ).frames
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, 10, denoise=0.6)
    assert (run(loaded, noise, sigmas=sigmas, cfg=15.0, latent=latent) * SCALE - expected).abs().max() < 1e-4


def test_native_euler_over_ddim_uniform_follows_the_pipeline(pipeline, loaded):
    noise = noise_of(1, 4, 8, 8, 8)
    expected = run_pipeline(pipeline, noise, 50)
    sampling = loaded[0].get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "ddim_uniform", 50)
    latents = run(loaded, noise, sampler=comfy.samplers.sampler_object("euler"), sigmas=sigmas)
    assert (latents * SCALE - expected).norm() / expected.norm() < 0.01


def test_eta_changes_the_clip_and_follows_the_seed(loaded):
    noise = noise_of(1, 4, 4, 8, 8)
    runs = [
        run(loaded, noise, steps=4, sampler=reference.reference_sampler("ddim", eta), seed=seed)
        for eta, seed in ((0, 1), (0, 2), (1, 1), (1, 1), (1, 2))
    ]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[2], runs[3])
    assert (runs[2] - runs[0]).abs().max() > 1e-2 < (runs[4] - runs[2]).abs().max()
