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
from consistent_video.patches.dynamic_cfg import DynamicGuidance, install_dynamic_cfg
from consistent_video.samplers import reference, schedules
from consistent_video.samplers.filters import LowPass
from consistent_video.samplers.guidance import ImageTextGuider
from consistent_video.samplers.noise import FrameInitNoise
from native_sampling import sample

FOLDER = Path(__file__).parent / "goldens" / "consisti2v_A"
META = json.loads((FOLDER / "meta.json").read_text(encoding="utf-8"))
SCALE = 0.18215


@pytest.fixture(scope="module")
def goldens():
    return load_file(FOLDER / "tensors.safetensors")


@pytest.fixture(scope="module")
def model():
    network = build_on_meta(
        ConsistI2VUNet, json.loads((FOLDER / "unet_config.json").read_text(encoding="utf-8")), "golden"
    )
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


STRENGTHS = {"cfg_text": 4.0, "cfg_image": 1.5}


def first_prediction(model, goldens, **strengths):
    """The scaled x0 that the first step sees, over three branches."""
    guider, found = ImageTextGuider(model, **strengths), []
    guider.set_conds(*prompts(goldens))
    noise, sigmas = goldens["none_vanilla.initial_noise"], schedules.reference_sigmas(META["scheduler"], 1)
    sampler = comfy.samplers.sampler_object("euler")
    guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, callback=lambda _, x0, *__: found.append(x0))
    return found[0]


@pytest.fixture(scope="module")
def branches(model, goldens):
    """x0 of the three branches at the first step: text, picture, nothing."""
    seen = []
    watched = model.clone()
    watched.set_model_sampler_calc_cond_batch_function(
        lambda args: (
            seen.append(comfy.samplers.calc_cond_batch(args["model"], args["conds"], args["input"], args["sigma"], {}))
            or seen[-1]
        )
    )
    first_prediction(watched, goldens, **STRENGTHS)
    assert all((one - other).abs().max() > 0.01 for one in seen[0] for other in seen[0] if one is not other)
    return seen[0]


def swap(args):
    return args["conds_out"][::-1]


def no_guidance(args):
    return args["input"] - args["cond_denoised"]


def double(args):
    return 2 * args["denoised"]


@pytest.mark.parametrize("place", ["before", "instead", "after", "dynamic", "cfg 1"])
def test_what_nodes_put_on_the_guidance_acts_with_a_picture_too(model, goldens, branches, place):
    text, picture, nothing = branches
    patched, strengths, step = model.clone(), dict(STRENGTHS), text - picture
    if place == "before":
        patched.set_model_sampler_pre_cfg_function(swap)
        expected = text - 4.0 * step
    elif place == "instead":
        patched.set_model_sampler_cfg_function(no_guidance)
        expected = text
    elif place == "dynamic":
        patched = install_dynamic_cfg(patched)
        timestep = schedules.timesteps(META["scheduler"], 1)[0]
        expected = picture + DynamicGuidance().scale(4.0, timestep) * step
    else:
        strengths["cfg_text"] = 1.0 if place == "cfg 1" else 4.0
        expected = picture + strengths["cfg_text"] * step
    expected = expected + 0.5 * (picture - nothing)
    if place == "after":
        patched.set_model_sampler_post_cfg_function(double)
        expected = 2 * expected
    torch.testing.assert_close(first_prediction(patched, goldens, **strengths), expected, rtol=0, atol=1e-4)


def test_rescale_comes_after_what_nodes_put_on_the_guidance(model, goldens):
    """It is of the text branch as the network gave it, whatever a node makes of the branches."""
    patched, seen = model.clone(), []
    patched.set_model_sampler_pre_cfg_function(lambda args: [7 * args["conds_out"][0], args["conds_out"][1]])
    patched.set_model_sampler_post_cfg_function(lambda args: seen.append(args["denoised"]) or args["denoised"])
    plain, changed = (first_prediction(one, goldens, **STRENGTHS, rescale=1.0) for one in (model, patched))
    assert (changed - seen[0]).abs().max() > 1
    assert (changed[:, :, 1:].std() / plain[:, :, 1:].std()).log().abs() < 0.3 < (seen[0].std() / plain.std()).log()


def test_samplers_that_read_the_guidance_work_with_a_picture(model, goldens):
    """ComfyUI's cfg_pp samplers take the negative branch from a function after the guidance."""
    guider = ImageTextGuider(model, **STRENGTHS)
    guider.set_conds(*prompts(goldens))
    noise = goldens["none_vanilla.initial_noise"]
    sigmas = schedules.reference_sigmas(META["scheduler"], 3)
    sampler = comfy.samplers.sampler_object("euler_cfg_pp")
    assert guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, disable_pbar=True).isfinite().all()


@pytest.mark.parametrize("name", ["reference", "euler"])
def test_the_branch_without_a_picture_keeps_its_noise_in_the_second_half(model, goldens, name):
    sampler = reference.reference_sampler() if name == "reference" else comfy.samplers.sampler_object(name)
    noise = goldens["none_vanilla.initial_noise"]
    sigmas = schedules.reference_sigmas(META["scheduler"], 20)

    def run(sigmas, noise, latent):
        guider = ImageTextGuider(model, 4.0, 3.0)
        guider.set_conds(*prompts(goldens))
        return guider.sample(noise, latent, sampler, sigmas, disable_pbar=True)

    nothing = torch.zeros_like(noise)
    whole = run(sigmas, noise, nothing)
    halves = run(sigmas[5:], nothing, run(sigmas[:6], noise, nothing))
    assert (halves - whole).abs().max() < 1e-3 * whole.abs().max()
