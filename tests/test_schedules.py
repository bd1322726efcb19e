"""Schedules against diffusers' own schedulers."""

import math

import comfy.model_sampling
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from consistent_video.samplers import schedules

MODELSCOPE = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "skip_prk_steps": True,
}
I2VGEN_XL = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "clip_sample": False,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "thresholding": False,
}
DPM = MODELSCOPE | {"_class_name": "DPMSolverMultistepScheduler"}
CLASSES = {"DDIMScheduler": DDIMScheduler, "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler}

CONFIGS = {
    "modelscope": MODELSCOPE,
    "i2vgen_xl": I2VGEN_XL,
    "defaults": {},
    "short": {"_class_name": "DDIMScheduler", "num_train_timesteps": 77, "steps_offset": 1},
    "trained_betas": {
        "trained_betas": [0.001 * (i + 1) for i in range(60)],
        "num_train_timesteps": 60,
        "beta_schedule": "scaled_linear",
    },
    "linear_zero_snr": {"beta_schedule": "linear", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "scaled_zero_snr": MODELSCOPE | {"rescale_betas_zero_snr": True},
    "dpm": DPM,
    "dpm_defaults": {"_class_name": "DPMSolverMultistepScheduler"},
    "dpm_cosine": {
        "_class_name": "DPMSolverMultistepScheduler",
        "beta_schedule": "squaredcos_cap_v2",
        "lambda_min_clipped": -5.1,
    },
    "dpm_zero_snr": DPM | {"rescale_betas_zero_snr": True},
}


def published(config: dict):
    """The diffusers scheduler of a configuration."""
    fields = {key: value for key, value in config.items() if key not in ("_class_name", "skip_prk_steps")}
    scheduler_class = CLASSES[config.get("_class_name", "DDIMScheduler")]
    if scheduler_class is DPMSolverMultistepScheduler:
        fields = {key: value for key, value in fields.items() if key not in ("clip_sample", "set_alpha_to_one")}
    return scheduler_class(**fields)


@pytest.mark.parametrize("name", CONFIGS)
def test_alphas_are_the_schedulers_bits(name):
    alphas = schedules.alphas_cumprod(CONFIGS[name])
    assert alphas.dtype == torch.float32
    assert torch.equal(alphas, published(CONFIGS[name]).alphas_cumprod)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_timesteps_are_the_schedulers(name, offset, spacing):
    config = CONFIGS[name] | {"timestep_spacing": spacing, "steps_offset": offset}
    scheduler = published(config)
    for steps in (1, 7, 10, 25, 50):
        scheduler.set_timesteps(steps)
        assert schedules.timesteps(config, steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_missing_spacing_and_offset_take_the_class_defaults(name):
    config = {key: value for key, value in CONFIGS[name].items() if key not in ("timestep_spacing", "steps_offset")}
    scheduler = published(config)
    scheduler.set_timesteps(20)
    assert schedules.timesteps(config, 20) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("name", ["dpm", "dpm_defaults", "dpm_cosine", "dpm_zero_snr"])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_dpm_sigmas_are_the_schedulers(name, spacing):
    config = CONFIGS[name] | {"timestep_spacing": spacing}
    scheduler = published(config)
    for steps in (1, 10, 25, 50):
        scheduler.set_timesteps(steps)
        assert torch.equal(schedules.reference_sigmas(config, steps), scheduler.sigmas)


def test_ddim_sigmas_are_the_noise_levels_of_its_timesteps():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)[list(range(981, 0, -20))]
    sigmas = schedules.reference_sigmas(MODELSCOPE, 50)
    assert sigmas.shape == (51,) and sigmas.dtype == torch.float32 and sigmas[-1] == 0
    torch.testing.assert_close(sigmas[:-1].double(), ((1 - alphas) / alphas).sqrt(), rtol=1e-4, atol=0)


def test_table_is_ascending_and_clamped_as_comfyui_clamps_it():
    sigmas = schedules.table_sigmas(I2VGEN_XL)
    assert torch.all(sigmas.diff() > 0)
    native = comfy.model_sampling.rescale_zero_terminal_snr_sigmas(schedules.table_sigmas(MODELSCOPE))
    torch.testing.assert_close(sigmas[-1], native[-1], rtol=1e-6, atol=0)
    assert sigmas[-1].item() == pytest.approx(schedules.ZERO_SNR_SIGMA, rel=1e-6)


def test_table_equals_comfyuis_own_table_of_the_same_betas():
    native = comfy.model_sampling.ModelSamplingDiscrete()  # scaled linear, 0.00085 to 0.012
    torch.testing.assert_close(schedules.table_sigmas(MODELSCOPE), native.sigmas, rtol=1e-4, atol=0)


def test_table_needs_no_supported_scheduler_class():
    config = MODELSCOPE | {"_class_name": "PNDMScheduler"}
    assert torch.equal(schedules.table_sigmas(config), schedules.table_sigmas(MODELSCOPE))


@pytest.mark.parametrize("denoise, count", [(1.0, 50), (0.999, 49), (0.6, 30), (0.58, 28), (0.02, 1)])
def test_denoise_keeps_the_last_timesteps(denoise, count):
    full = schedules.reference_sigmas(MODELSCOPE, 50)
    partial = schedules.reference_sigmas(MODELSCOPE, 50, denoise)
    assert torch.equal(partial, full[-(count + 1) :])


@pytest.mark.parametrize("steps, denoise", [(50, 0.0), (10, 0.09)])
def test_nothing_to_denoise_is_an_empty_schedule(steps, denoise):
    assert schedules.reference_sigmas(MODELSCOPE, steps, denoise).shape == (0,)


def test_final_alpha():
    assert schedules.final_alpha(I2VGEN_XL) == 1.0
    assert schedules.final_alpha({}) == 1.0
    assert schedules.final_alpha(MODELSCOPE) == published(MODELSCOPE).final_alpha_cumprod.item() < 1.0


def test_trailing_spacing_leaves_out_the_timestep_below_zero():
    visited = schedules.timesteps(MODELSCOPE | {"timestep_spacing": "trailing"}, 61)
    assert len(visited) == 61 and visited[0] == 999 and visited[-1] == 15


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}.*Choose 1 to 1000 steps"):
        schedules.timesteps(MODELSCOPE, steps)


@pytest.mark.parametrize(
    "config", [MODELSCOPE, DPM | {"timestep_spacing": "leading"}, DPM | {"timestep_spacing": "linspace"}]
)
def test_steps_that_leave_the_table_or_repeat(config):
    with pytest.raises(ValueError, match="1000 steps with .* Choose fewer steps"):
        schedules.timesteps(config, 1000)


@pytest.mark.parametrize("denoise", [-0.01, 1.01, math.nan])
def test_impossible_denoise(denoise):
    with pytest.raises(ValueError, match="denoise is .* from 0 "):
        schedules.reference_sigmas(MODELSCOPE, 50, denoise)


@pytest.mark.parametrize("field", schedules.RESPACED_SIGMAS)
def test_respaced_sigmas_are_refused(field):
    with pytest.raises(ValueError, match=f"{field}.*native scheduler"):
        schedules.timesteps(DPM | {field: True}, 25)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="PNDMScheduler.*BasicScheduler"):
        schedules.timesteps(MODELSCOPE | {"_class_name": "PNDMScheduler"}, 25)
    with pytest.raises(ValueError, match="'sideways'.*leading, linspace, trailing"):
        schedules.timesteps(MODELSCOPE | {"timestep_spacing": "sideways"}, 25)
    with pytest.raises(ValueError, match="'sigmoid'.*squaredcos_cap_v2"):
        schedules.alphas_cumprod({"beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="2 trained_betas for num_train_timesteps 1000"):
        schedules.alphas_cumprod({"trained_betas": [0.1, 0.2]})
