"""Guidance that changes over the run: against ConsisIDPipeline's values, and together with other guidance nodes."""

import functools
import math

import comfy.model_base
import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_model_advanced import RescaleCFG
from diffusers import AutoencoderKLCogVideoX, ConsisIDTransformer3DModel

# The name in the package itself is a stand-in that asks for OpenCV, which the loop does not need.
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline
from PIL import Image
from toy_video_model import CONSISID, SCHEDULERS, SEED, build, noise, prompts, published, run

from consistent_video.patches.dynamic_cfg import DynamicGuidance, install_dynamic_cfg
from consistent_video.samplers import schedules

DDIM = CONSISID | {"_class_name": "CogVideoXDDIMScheduler"}


@functools.cache
def pipeline_guidance(steps: int) -> list[tuple[int, float]]:
    """Timestep and guidance of every step of ConsisIDPipeline with dynamic guidance of 6, over a tiny network."""
    transformer = ConsisIDTransformer3DModel(
        num_attention_heads=1, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=2, num_layers=1,
        text_embed_dim=8, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=4,
        use_rotary_positional_embeddings=False, is_train_face=False,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    scheduler = SCHEDULERS[CONSISID["_class_name"]].from_config(CONSISID)
    pipeline = ConsisIDPipeline(None, None, vae, transformer, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    seen = []

    def record(pipeline, step, timestep, tensors):
        seen.append((int(timestep), pipeline.guidance_scale))
        return tensors

    text = torch.zeros(1, 4, 8)
    pipeline(
        Image.new("RGB", (32, 32)), height=32, width=32, num_frames=9, num_inference_steps=steps, guidance_scale=6.0,
        use_dynamic_cfg=True, prompt_embeds=text, negative_prompt_embeds=text, max_sequence_length=4,
        output_type="latent", callback_on_step_end=record, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return seen


def strengths(model, sigmas, cfg: float = 6.0, **kwargs) -> list[float]:
    """What a function in the place of the guidance gets as its strength, the last time in each step."""
    seen, ends = [], []

    def guide(args: dict) -> torch.Tensor:
        seen.append(args["cond_scale"])
        return args["uncond"] + args["cond_scale"] * (args["cond"] - args["uncond"])

    model = model.clone()
    model.set_model_sampler_cfg_function(guide)
    run(model, sigmas, noise(), cfg=cfg, callback=lambda *_: ends.append(seen[-1]), **kwargs)
    return ends


@pytest.mark.parametrize("steps", [6, 8, 50])
def test_reference_mode_has_the_pipelines_guidance_in_every_step(steps):
    expected = pipeline_guidance(steps)
    guidance = DynamicGuidance("reference", steps)
    assert [(timestep, guidance.scale(6.0, timestep)) for timestep, _ in expected] == expected
    model = install_dynamic_cfg(build(CONSISID), "reference", steps)
    sigmas = schedules.reference_sigmas(CONSISID, steps)
    assert strengths(model, sigmas) == [scale for _, scale in expected]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [6, 8])
def test_latents_are_those_of_the_published_loop(name, steps):
    config = CONSISID | {"_class_name": name}
    model = install_dynamic_cfg(build(config), "reference", steps)
    ours = run(model, schedules.reference_sigmas(config, steps), noise(), cfg=6.0)
    theirs, _ = published(config, steps, noise(), [scale for _, scale in pipeline_guidance(steps)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("steps", [8, 25, 50])
def test_progress_mode_goes_by_the_share_of_steps_done(steps):
    model = install_dynamic_cfg(build(CONSISID), "progress")
    seen = strengths(model, schedules.reference_sigmas(CONSISID, steps))
    expected = [1 + 6 * (1 - math.cos(math.pi * (step / steps) ** 5)) / 2 for step in range(steps)]
    assert seen == pytest.approx(expected, abs=1e-9)
    assert seen[0] == 1 and seen == sorted(seen)
    if steps == 50:
        assert [seen[25], seen[40], seen[49]] == pytest.approx([1.014446, 2.454096, 6.864372], abs=1e-6)


def test_the_number_of_steps_does_not_matter_in_progress_mode():
    assert DynamicGuidance("progress", 8).scale(6.0, 499) == DynamicGuidance("progress", 50).scale(6.0, 499)


@pytest.mark.parametrize("mode", ["progress", "reference"])
def test_guidance_goes_by_sigma_alone(mode):
    model, sigmas = install_dynamic_cfg(build(DDIM), mode, 10), schedules.reference_sigmas(DDIM, 10)
    whole = run(model, sigmas, noise(), cfg=6.0)
    half = run(model, sigmas[:6], noise(), cfg=6.0)
    second = run(model, sigmas[5:], torch.zeros_like(half), latent=half, cfg=6.0)
    torch.testing.assert_close(second, whole, rtol=0, atol=1e-5)
    assert torch.equal(run(model, sigmas, noise(), cfg=6.0), whole)


def test_ksampler_is_guided_as_the_guider_is():
    model = install_dynamic_cfg(build(CONSISID), "progress")
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 8)
    theirs = run(model, sigmas, noise(), cfg=6.0, sampler=comfy.samplers.sampler_object("euler"))
    ours = comfy.sample.sample(
        model, noise(), 8, 6.0, "euler", "simple", *prompts(), torch.zeros_like(noise()), seed=SEED, disable_pbar=True
    )
    assert torch.equal(ours, theirs)
    plain = run(build(CONSISID), sigmas, noise(), cfg=6.0, sampler=comfy.samplers.sampler_object("euler"))
    assert (ours - plain).abs().mean() > 0.05


@pytest.mark.parametrize("cfg", [0.5, 1.0])
def test_no_guidance_stays_none(cfg):
    model, sigmas = build(CONSISID), schedules.reference_sigmas(CONSISID, 8)
    assert torch.equal(
        run(install_dynamic_cfg(model, "reference", 8), sigmas, noise(), cfg=cfg), run(model, sigmas, noise(), cfg=cfg)
    )


def rescaled(model):
    return RescaleCFG().patch(model, 0.7)[0]


def test_joins_a_node_that_stands_in_for_the_guidance():
    model, sigmas = build(DDIM), schedules.reference_sigmas(DDIM, 1)
    strength = DynamicGuidance("reference", 50).scale(6.0, 999)
    expected = run(rescaled(model), sigmas, noise(), cfg=strength)
    before, after = install_dynamic_cfg(rescaled(model), "reference"), rescaled(install_dynamic_cfg(model, "reference"))
    for patched in (before, after):
        assert torch.equal(run(patched, sigmas, noise(), cfg=6.0), expected)
    assert not torch.equal(run(rescaled(model), sigmas, noise(), cfg=6.0), expected)


@pytest.mark.parametrize("first", [True, False])
def test_joins_nodes_that_work_on_the_guided_result(first):
    def add(args: dict) -> torch.Tensor:
        return args["denoised"] + 1

    def patch(model):
        model = model.clone()
        model.set_model_sampler_post_cfg_function(add)
        return model

    model, sigmas = build(DDIM), schedules.reference_sigmas(DDIM, 1)
    plain = run(install_dynamic_cfg(model), sigmas, noise(), cfg=6.0)
    both = install_dynamic_cfg(patch(model)) if first else patch(install_dynamic_cfg(model))
    torch.testing.assert_close(run(both, sigmas, noise(), cfg=6.0), plain + 1, rtol=0, atol=1e-6)


def test_the_model_itself_is_left_alone():
    model, sigmas = build(CONSISID), schedules.reference_sigmas(CONSISID, 8)
    before = run(model, sigmas, noise(), cfg=6.0)
    patched = install_dynamic_cfg(model)
    assert "sampler_post_cfg_function" not in model.model_options and patched.model is model.model
    assert torch.equal(run(model, sigmas, noise(), cfg=6.0), before)


def test_impossible_choices_are_refused():
    model = build(CONSISID)
    with pytest.raises(ValueError, match="'linear'.*progress, reference"):
        install_dynamic_cfg(model, "linear")
    with pytest.raises(ValueError, match="steps is 0.*1 or more"):
        install_dynamic_cfg(model, "reference", 0)
    with pytest.raises(ValueError, match="already"):
        install_dynamic_cfg(install_dynamic_cfg(model))


def test_models_without_timesteps_are_refused():
    model = build(CONSISID)
    sampling = comfy.model_base.model_sampling(model.model.model_config, comfy.model_base.ModelType.FLOW)
    model.add_object_patch("model_sampling", sampling)
    with pytest.raises(ValueError, match="VideoModel has no table.*epsilon and v-prediction"):
        install_dynamic_cfg(model)
