"""ConsistI2V's MODEL against what the original code gave for the same weights, noise and text."""

import json
from pathlib import Path

import comfy.latent_formats
import comfy.model_patcher
import comfy.ops
import comfy.samplers
import pytest
import torch
from safetensors.torch import load_file

from consistent_video.loaders.network import build_on_meta, load_network
from consistent_video.models.base import VideoModelConfig
from consistent_video.models.consisti2v import FIRST_FRAME, FRAME_STRIDE, ConsistI2VModel
from consistent_video.models.consisti2v_unet import ConsistI2VUNet, drop_dead_keys
from consistent_video.models.latent_format import FrameLatentFormat
from consistent_video.models.unet3d import REPLACEMENTS
from consistent_video.samplers import reference, schedules
from consistent_video.samplers.filters import LowPass
from consistent_video.samplers.guidance import ImageTextGuider
from consistent_video.samplers.noise import FrameInitNoise
from native_sampling import sample

FOLDER = Path(__file__).parent / "goldens" / "consisti2v_A"
META = json.loads((FOLDER / "meta.json").read_text())
SCALE = 0.18215


@pytest.fixture(scope="module")
def goldens():
    return load_file(FOLDER / "tensors.safetensors")


@pytest.fixture(scope="module")
def model():
    network = build_on_meta(ConsistI2VUNet, json.loads((FOLDER / "unet_config.json").read_text()), "golden")
    state = drop_dead_keys(load_file(FOLDER / "unet.safetensors"))
    scheduler = META["scheduler"]
    config = VideoModelConfig(torch.float32, None, FrameLatentFormat(SCALE), 32, {"timesteps": 1000})
    base = ConsistI2VModel(
        config,
        scheduler,
        schedules.table_sigmas(scheduler),
        lambda operations: load_network(network, state, torch.float32, operations, REPLACEMENTS, "golden"),
    )
    return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def prompts(goldens):
    extra = {FIRST_FRAME: goldens["pipe.first_frame_latent"].unsqueeze(2) / SCALE, FRAME_STRIDE: META["frame_stride"]}
    return [[[goldens[f"pipe.{name}"], dict(extra)]] for name in ("text_cond", "text_uncond")]


class Fixed:
    """A NOISE of given values."""

    seed = 0

    def __init__(self, noise):
        self.noise = noise

    def generate_noise(self, latent):
        return self.noise


def run(model, goldens, noise, **kwargs):
    sigmas = schedules.reference_sigmas(META["scheduler"], META["steps"])
    latents = sample(model, *prompts(goldens), noise, reference.reference_sampler(), sigmas, **kwargs)
    return latents * SCALE


def initial_noise(model, goldens, name):
    noise = goldens[f"{name}.initial_noise"]
    if not META["runs"][name]["frameinit"]:
        return noise
    static = {"samples": goldens["pipe.first_frame_latent"].unsqueeze(2).expand(-1, -1, noise.shape[2], -1, -1) / SCALE}
    low_pass = LowPass("gaussian", META["filter"]["n"], META["filter"]["d_s"], META["filter"]["d_t"])
    guided = FrameInitNoise(Fixed(noise), model, static, META["frameinit_noise_level"], low_pass)
    return guided.generate_noise({"samples": torch.zeros_like(noise)})


@pytest.mark.parametrize("name", ["none_vanilla", "text_mixed_frameinit"])
def test_full_loops_equal_the_original(model, goldens, name):
    cfg = META["runs"][name]["guidance_scale_txt"]
    latents = run(model, goldens, initial_noise(model, goldens, name), cfg=cfg)
    assert (latents - goldens[f"{name}.latents"]).abs().max() < 2e-4


def guided(model, goldens, noise, cfg_text, cfg_image, rescale):
    guider = ImageTextGuider(model, cfg_text, cfg_image, rescale)
    guider.set_conds(*prompts(goldens))
    sigmas = schedules.reference_sigmas(META["scheduler"], META["steps"])
    sampler = reference.reference_sampler()
    return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0, disable_pbar=True)


@pytest.mark.parametrize("name", META["runs"])
def test_guidance_by_text_and_picture_equals_the_original(model, goldens, name):
    settings = META["runs"][name]
    strengths = [settings[f"guidance_{key}"] for key in ("scale_txt", "scale_img", "rescale")]
    latents = guided(model, goldens, initial_noise(model, goldens, name), *strengths) * SCALE
    assert (latents - goldens[f"{name}.latents"]).abs().max() < 2e-4


def test_without_picture_guidance_and_rescale_it_is_the_native_guider(model, goldens):
    noise = goldens["none_vanilla.initial_noise"]
    native = run(model, goldens, noise, cfg=4.0)
    assert torch.equal(guided(model, goldens, noise, 4.0, 1.0, 0.0) * SCALE, native)
    assert (guided(model, goldens, noise, 4.0, 2.0, 0.0) * SCALE - native).abs().max() > 1e-2


def test_impossible_guidance_is_named(model):
    with pytest.raises(ValueError, match="rescale is 1.5"):
        ImageTextGuider(model, rescale=1.5)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "ddim"])
def test_every_sampler_ends_with_the_clean_first_frame(model, goldens, name):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 3)
    latents = sample(
        model, *prompts(goldens), goldens["none_vanilla.initial_noise"], comfy.samplers.sampler_object(name), sigmas
    )
    first = goldens["pipe.first_frame_latent"] / SCALE
    assert (latents[:, :, 0] - first).abs().max() < 1e-5 * first.abs().max()
    assert (latents[:, :, 1] - first).abs().max() > 0.1


def test_missing_first_frame_and_wrong_size_are_named(model, goldens):
    noise = goldens["none_vanilla.initial_noise"]
    text = [[goldens["pipe.text_cond"], {}]]
    sigmas = schedules.reference_sigmas(META["scheduler"], 1)
    with pytest.raises(ValueError, match="connect both prompts through ConsistI2V Conditioning"):
        sample(model, text, text, noise, reference.reference_sampler(), sigmas)
    with pytest.raises(ValueError, match="prepared for latents of \\(8, 8\\)"):
        run(model, goldens, noise[..., :6])
    with pytest.raises(ValueError, match="2 frames or more"):
        run(model, goldens, noise[:, :, :1])
