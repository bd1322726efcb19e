"""ConsisID in ComfyUI against the published pipeline: same tiny weights, same noise, same face."""

import numpy
import pytest
import tiny_consisid
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from diffusers.pipelines.consisid import pipeline_consisid as published
from diffusers.schedulers import scheduling_dpm_cogvideox
from PIL import Image
from test_i2vgenxl_parity import picture_of

from consistent_video.faces.key_points import draw_key_points
from consistent_video.loaders import checkpoint
from consistent_video.loaders.families import CONSISID
from consistent_video.models import consisid_conditioning
from consistent_video.models.consisid import KEY_POINTS, PICTURE
from consistent_video.patches.dynamic_cfg import install_dynamic_cfg
from consistent_video.samplers import reference, schedules
from consistent_video.samplers.step_noise import RowNoise, row_seeds
from native_sampling import conditioning, sample

PROMPT, NEGATIVE = "a woman waves at the camera, film grain", "blurry"
HEIGHT, WIDTH = 64, 96
SCALE = 0.7
SEED = 5
STEPS = 6
POINTS = [[18.0, 20.0], [41.0, 19.0], [30.0, 31.0], [20.0, 42.0], [39.0, 41.0]]
SCHEDULERS = {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tiny checkpoints without and with key points."""
    root = tmp_path_factory.mktemp("consisid")
    return {kps: tiny_consisid.write_consisid(root / f"kps-{kps}", is_kps=kps) for kps in (False, True)}


@pytest.fixture(scope="module")
def pipelines(folders):
    # The class in diffusers' top level asks for OpenCV, which only draw_kps needs.
    loaded = {kps: published.ConsisIDPipeline.from_pretrained(folder) for kps, folder in folders.items()}
    for pipeline in loaded.values():
        pipeline.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def loaded(folders):
    return {kps: checkpoint.load_folder(CONSISID, folder, "default") for kps, folder in folders.items()}


def noise_of(frames, clips=1, seed=0):
    shape = (clips, 16, (frames - 1) // 4 + 1, HEIGHT // 8, WIDTH // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def portrait():
    """A picture of 60 x 60 pixels and its drawn key points."""
    return picture_of(60, 60).unsqueeze(0), draw_key_points(numpy.array(POINTS), 60, 60)


def pillow(images):
    return Image.fromarray((images[0] * 255).round().to(torch.uint8).numpy())


def prompts(loaded, strength=1.0, seed=SEED, face=0, texts=(PROMPT, NEGATIVE), **kwargs):
    _, clip, vae = loaded
    identity, vision = tiny_consisid.face(face)
    return consisid_conditioning.condition_prompts(
        *(conditioning(clip, text) for text in texts),
        vae,
        *portrait(),
        identity,
        vision,
        WIDTH,
        HEIGHT,
        strength,
        seed=seed,
        **kwargs,
    )


def run(loaded, noise, cfg=6.0, steps=STEPS, model=None, algorithm="auto", **kwargs):
    """Latents as the network has them."""
    model = loaded[0] if model is None else model
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, steps)
    both = prompts(loaded, **kwargs)
    return SCALE * sample(model, *both, noise, reference.reference_sampler(algorithm), sigmas, cfg=cfg, seed=SEED)


def draws_of(noise):
    """What the reference sampler draws in a run with seed `SEED`, frames before channels as in the scheduler."""
    draw = RowNoise(row_seeds(SEED, noise))
    return lambda *args, **kwargs: draw(noise.transpose(1, 2))


def run_pipeline(pipeline, noise, scheduler, cfg=6.0, steps=STEPS, monkeypatch=None, **kwargs):
    pipeline.scheduler = SCHEDULERS[scheduler].from_config(pipeline.scheduler.config)
    picture, points = portrait()
    monkeypatch.setattr(published, "draw_kps", lambda image, points: points)
    monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", draws_of(noise))
    identity, vision = tiny_consisid.face()
    clip = pipeline(
        image=pillow(picture),
        kps_cond=pillow(points),
        id_cond=identity,
        id_vit_hidden=vision,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        latents=noise.transpose(1, 2),
        height=HEIGHT,
        width=WIDTH,
        num_frames=(noise.shape[2] - 1) * 4 + 1,
        num_inference_steps=steps,
        guidance_scale=cfg,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **kwargs,
    )
    return clip.frames.transpose(1, 2)


@pytest.mark.parametrize("text", [PROMPT, "", "a " * 400])
def test_text_states_are_the_pipelines(pipelines, loaded, text):
    expected = pipelines[False].encode_prompt(text, do_classifier_free_guidance=False)[0]
    found = conditioning(loaded[False][1], text)[0][0]
    assert found.shape == (1, tiny_consisid.TEXT_TOKENS, tiny_consisid.TEXT_WIDTH)
    assert (found - expected).abs().max() < 1e-5


def test_latents_of_picture_and_key_points_are_the_pipelines_draws(pipelines, loaded):
    pipeline, generator = pipelines[True], torch.Generator().manual_seed(SEED)
    positive, negative = prompts(loaded[True])
    for key, picture in zip((PICTURE, KEY_POINTS), portrait()):
        pixels = pipeline.video_processor.preprocess(pillow(picture), height=HEIGHT, width=WIDTH)
        expected = pipeline.vae.encode(pixels.unsqueeze(2)).latent_dist.sample(generator)
        found = positive[0][1][key]
        assert found.shape == (1, 16, 1, HEIGHT // 8, WIDTH // 8)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.equal(found, negative[0][1][key])


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
@pytest.mark.parametrize("key_points", [False, True])
@pytest.mark.parametrize("frames", [9, 13, 49])
def test_six_steps_equal_the_pipeline(pipelines, loaded, monkeypatch, scheduler, key_points, frames):
    noise = noise_of(frames)
    expected = run_pipeline(pipelines[key_points], noise, scheduler, monkeypatch=monkeypatch)
    found = run(loaded[key_points], noise, algorithm=f"cogvideox_{scheduler}")
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("scheduler", ["ddim", "dpm"])
def test_dynamic_cfg_equals_the_pipeline(pipelines, loaded, monkeypatch, scheduler):
    noise = noise_of(9, seed=1)
    expected = run_pipeline(pipelines[True], noise, scheduler, monkeypatch=monkeypatch, use_dynamic_cfg=True)
    model = install_dynamic_cfg(loaded[True][0], "reference", STEPS)
    algorithm = f"cogvideox_{scheduler}"
    found = run(loaded[True], noise, model=model, algorithm=algorithm)
    assert (found - expected).abs().max() < 1e-4
    assert (run(loaded[True], noise, algorithm=algorithm) - expected).abs().max() > 1e-2


def test_without_guidance_equals_the_pipeline(pipelines, loaded, monkeypatch):
    noise = noise_of(13, seed=2)
    expected = run_pipeline(pipelines[False], noise, "dpm", cfg=1.0, monkeypatch=monkeypatch)
    assert (run(loaded[False], noise, cfg=1.0) - expected).abs().max() < 1e-4


def test_strength_is_the_networks_face_scale(pipelines, loaded, monkeypatch):
    noise, transformer = noise_of(9), pipelines[False].transformer
    monkeypatch.setattr(transformer, "local_face_scale", 0.35)
    expected = run_pipeline(pipelines[False], noise, "ddim", monkeypatch=monkeypatch)
    found = run(loaded[False], noise, strength=0.35, algorithm="cogvideox_ddim")
    assert (found - expected).abs().max() < 1e-4
    full = run(loaded[False], noise, algorithm="cogvideox_ddim")
    assert (full - expected).abs().max() > 1e-2
    assert loaded[False][0].model.diffusion_model.config.local_face_scale == 1.0


def test_decoded_clip_is_the_pipelines(pipelines, loaded, monkeypatch):
    noise = noise_of(9)
    expected = run_pipeline(pipelines[False], noise, "dpm", monkeypatch=monkeypatch)
    found = run(loaded[False], noise)
    frames = pipelines[False].vae.decode(expected / SCALE).sample[0].movedim(0, -1)
    shown = loaded[False][2].decode(found / SCALE)
    assert shown.shape == (1, 9, HEIGHT, WIDTH, 3)
    assert (shown[0] - (frames / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-3
