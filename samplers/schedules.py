"""Noise schedules of diffusers scheduler configurations (`scheduler_config.json`) as ComfyUI sigmas.

Every function takes the configuration as a dictionary. Fields it does not know are ignored here, and named when a
checkpoint is loaded; a missing field takes the default of the configuration's `_class_name` (of DDIMScheduler when
there is none). T is the number of training timesteps, a the cumulative product of 1 - beta, and sigma =
sqrt((1 - a) / a) the noise level of the variance-exploding space that ComfyUI samples in.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy
import torch

# ComfyUI's finite stand-in for an alpha of exactly zero, whose sigma would be infinite.
ZERO_SNR_ALPHA = 4.8973451890853435e-08
ZERO_SNR_SIGMA = math.sqrt((1 - ZERO_SNR_ALPHA) / ZERO_SNR_ALPHA)

# What DPMSolverMultistepScheduler puts in the same place (the smallest positive half-precision number).
DPM_ZERO_SNR_ALPHA = 2**-24

# A cosine schedule never removes more than this share of the signal in one step.
COSINE_MAX_BETA = 0.999

DEFAULTS = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "leading",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "lambda_min_clipped": -math.inf,
}
COGVIDEOX_CLASSES = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
COGVIDEOX_DEFAULTS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "snr_shift_scale": 3.0,
    "clip_sample": False,  # their own default is True, but they do not clip
}
# Classes whose steps clip x0 unless a configuration says otherwise.
CLIPPING_CLASSES = ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "TCDScheduler")
CLASS_DEFAULTS = {
    "DPMSolverMultistepScheduler": {"timestep_spacing": "linspace", "clip_sample": False},
    **dict.fromkeys(COGVIDEOX_CLASSES, COGVIDEOX_DEFAULTS),
}

# diffusers' names of beta schedules -> ComfyUI's. Its "squaredcos_cap_v2" is the same as "cosine", but no tensor.
COMFYUI_SCHEDULES = {"linear": "sqrt_linear", "scaled_linear": "linear", "squaredcos_cap_v2": "cosine"}

# Fields of DPMSolverMultistepScheduler that leave the training timesteps for noise levels between them.
RESPACED_SIGMAS = (
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "use_lu_lambdas",
    "use_flow_sigmas",
)


def settings(config: dict) -> dict:
    """The configuration with every missing field filled in."""
    name = config.get("_class_name", DEFAULTS["_class_name"])
    others = {} if name in CLIPPING_CLASSES else {"clip_sample": False}
    return DEFAULTS | CLASS_DEFAULTS.get(name, others) | config


def alphas_cumprod(config: dict) -> torch.Tensor:
    """Cumulative product of 1 - beta, (T,), the bits of the diffusers scheduler: float32, or float64 where it is
    CogVideoX's over scaled_linear betas.

    Raises:
        ValueError: unknown `beta_schedule`, or `trained_betas` of another length than `num_train_timesteps`.
    """
    values = settings(config)
    betas = _betas(values)
    if values["_class_name"] in COGVIDEOX_CLASSES:
        return _cogvideox_alphas(values, betas)
    if values["rescale_betas_zero_snr"]:
        betas = _zero_terminal_snr(betas)
    alphas = torch.cumprod(1.0 - betas, dim=0)
    if values["rescale_betas_zero_snr"] and values["_class_name"] == "DPMSolverMultistepScheduler":
        alphas[-1] = DPM_ZERO_SNR_ALPHA
    return alphas


def table_sigmas(config: dict) -> torch.Tensor:
    """Sigma of every training timestep, (T,) float32, finite, for `ModelSamplingDiscrete.set_sigmas`.

    Where the last alpha is exactly zero, its sigma is ComfyUI's stand-in `ZERO_SNR_SIGMA`. (Rescaled linear betas pass
    that value two timesteps earlier; ComfyUI's own tables do the same.)

    Raises:
        ValueError: see `alphas_cumprod`.
    """
    alphas = alphas_cumprod(config)
    alphas = torch.where(alphas == 0, ZERO_SNR_ALPHA, alphas)
    return (((1 - alphas) / alphas) ** 0.5).float()


def sampling_settings(config: dict) -> dict:
    """The schedule in ComfyUI's words (`sampling_settings` of a model configuration), as far as it has them.

    Its nodes make a sampling space anew from them. `trained_betas` and CogVideoX's shift have no words there.
    """
    values = settings(config)
    found = {"timesteps": values["num_train_timesteps"], "zsnr": bool(values["rescale_betas_zero_snr"])}
    found |= {"linear_start": values["beta_start"], "linear_end": values["beta_end"]}
    if values["beta_schedule"] in COMFYUI_SCHEDULES:
        found["beta_schedule"] = COMFYUI_SCHEDULES[values["beta_schedule"]]
    return found


def final_alpha(config: dict) -> float:
    """Alpha that the last step of the reference sampler arrives at, in (0, 1]; below 1 a trace of noise remains."""
    return 1.0 if settings(config)["set_alpha_to_one"] else alphas_cumprod(config)[0].item()


def timesteps(config: dict, steps: int) -> list[int]:
    """The training timesteps that the scheduler's `set_timesteps(steps)` visits, descending.

    Where diffusers' trailing spacing rounds into an extra timestep -1 (61 steps of 1000, for one), it is left out.

    Raises:
        ValueError: `steps` outside 1..T, a scheduler class or spacing that is not supported, or timesteps that leave
            0..T-1 or repeat.
    """
    values = settings(config)
    total = values["num_train_timesteps"]
    if not 1 <= steps <= total:
        raise ValueError(
            f"steps is {steps}; the checkpoint's scheduler has {total} training timesteps. Choose 1 to {total} steps."
        )
    spacings = _spacings(values)
    spacing = values["timestep_spacing"]
    if spacing not in spacings:
        raise ValueError(
            f"The scheduler configuration has timestep_spacing {spacing!r}; expected one of {', '.join(spacings)}. "
            "Correct scheduler_config.json."
        )
    visited = spacings[spacing](values, steps)[:steps].astype(int).tolist()
    ascends = any(later >= earlier for earlier, later in pairwise(visited))
    if ascends or visited[0] >= total or visited[-1] < 0:
        raise ValueError(
            f"{steps} steps with {spacing} spacing and steps_offset {values['steps_offset']} do not give {steps} "
            f"different timesteps in 0..{total - 1}. Choose fewer steps."
        )
    return visited


def reference_sigmas(config: dict, steps: int, denoise: float = 1.0, table: torch.Tensor | None = None) -> torch.Tensor:
    """Sigmas of the checkpoint's own schedule, (n + 1,) float32: the table's sigma at each timestep, then 0.

    Args:
        config: the scheduler configuration.
        steps: steps of a full run, 1..T.
        denoise: share of the schedule to run, 0..1: the last n = int(steps * denoise) timesteps, as in diffusers'
            video-to-video pipeline. Where n is 0 the result is empty, (0,), which ComfyUI's samplers answer with the
            latent unchanged.
        table: (T,), sigmas of a model whose noise levels a node has changed; None: the configuration's.

    Raises:
        ValueError: `denoise` outside 0..1; see also `timesteps` and `alphas_cumprod`.
    """
    if not 0.0 <= denoise <= 1.0:
        raise ValueError(f"denoise is {denoise}. Choose a value from 0 (keep the latent) to 1 (the full schedule).")
    visited = timesteps(config, steps)
    count = min(int(steps * denoise), steps)
    if count == 0:
        return torch.zeros(0)
    table = table_sigmas(config) if table is None else table.detach().float().cpu()
    return torch.cat((table[visited[-count:]], torch.zeros(1)))


def follows_reference(config: dict, sigmas: torch.Tensor) -> bool:
    """Whether sigmas (n + 1,) are `reference_sigmas` of a full run of n steps."""
    try:
        reference = reference_sigmas(config, len(sigmas) - 1)
    except ValueError:  # a scheduler, or a number of steps, that has no reference schedule
        return False
    return torch.allclose(sigmas.float().cpu(), reference, rtol=1e-5, atol=0)


def _betas(values: dict) -> torch.Tensor:
    """Betas before any rescaling, (T,) float32; float64 for CogVideoX's scaled_linear."""
    total, first, last = values["num_train_timesteps"], values["beta_start"], values["beta_end"]
    schedule, trained = values["beta_schedule"], values["trained_betas"]
    if trained is not None:
        if len(trained) != total:
            raise ValueError(
                f"The scheduler configuration lists {len(trained)} trained_betas for num_train_timesteps {total}. "
                "Correct scheduler_config.json."
            )
        return torch.tensor(trained, dtype=torch.float32)
    if schedule == "linear":
        return torch.linspace(first, last, total, dtype=torch.float32)
    if schedule == "scaled_linear":
        precision = torch.float64 if values["_class_name"] in COGVIDEOX_CLASSES else torch.float32
        return torch.linspace(first**0.5, last**0.5, total, dtype=precision).square()
    if schedule == "squaredcos_cap_v2":
        return _cosine_betas(total)
    raise ValueError(
        f"The scheduler configuration has beta_schedule {schedule!r}; expected linear, scaled_linear or "
        "squaredcos_cap_v2. Correct scheduler_config.json, or list the betas under trained_betas."
    )


def _cosine_betas(total: int) -> torch.Tensor:
    """Betas (T,) whose alpha falls as a squared cosine (Nichol and Dhariwal 2021, eq. 17)."""
    levels = [math.cos((step / total + 0.008) / 1.008 * math.pi / 2) ** 2 for step in range(total + 1)]
    betas = [min(1 - after / before, COSINE_MAX_BETA) for before, after in pairwise(levels)]
    return torch.tensor(betas, dtype=torch.float32)


def _zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Betas (T,) whose last alpha is exactly zero."""
    alphas = _without_terminal_signal(torch.cumprod(1.0 - betas, dim=0))
    # Back to betas although callers want their product: the round trip is part of the scheduler's bits.
    return 1.0 - torch.cat((alphas[:1], alphas[1:] / alphas[:-1]))


def _without_terminal_signal(alphas: torch.Tensor) -> torch.Tensor:
    """Alphas (T,) rescaled so that the last is exactly zero (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    roots = alphas.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * (first / (first - last))).square()


def _cogvideox_alphas(values: dict, betas: torch.Tensor) -> torch.Tensor:
    """Alphas (T,) of CogVideoX's schedulers: a signal-to-noise ratio `snr_shift_scale` times smaller, then rescaled.

    The shift is that of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, section 5.3.2), as CogVideoX
    (arXiv 2408.06072) takes it over.
    """
    scale = values["snr_shift_scale"]
    alphas = torch.cumprod(1.0 - betas, dim=0)
    alphas = alphas / (scale + (1 - scale) * alphas)
    return _without_terminal_signal(alphas) if values["rescale_betas_zero_snr"] else alphas


def _spacings(values: dict) -> dict[str, Callable[[dict, int], numpy.ndarray]]:
    """Timestep spacings of the configuration's scheduler class by name."""
    name = values["_class_name"]
    if name == "DDIMScheduler" or name in COGVIDEOX_CLASSES:
        return {"leading": _ddim_leading, "linspace": _ddim_linspace, "trailing": _ddim_trailing}
    if name != "DPMSolverMultistepScheduler":
        raise ValueError(
            f"The checkpoint's scheduler is {name}; the reference schedule knows DDIMScheduler, "
            f"DPMSolverMultistepScheduler, {' and '.join(COGVIDEOX_CLASSES)}. Use a native scheduler node, such as "
            "BasicScheduler, with this model."
        )
    respaced = [field for field in RESPACED_SIGMAS if values.get(field)]
    if respaced:
        raise ValueError(
            f"The scheduler configuration sets {', '.join(respaced)}; the reference schedule knows plain sigmas only. "
            "Use a native scheduler node, such as BasicScheduler with karras, exponential or beta, with this model."
        )
    return {"leading": _dpm_leading, "linspace": _dpm_linspace, "trailing": _dpm_trailing}


def _ddim_leading(values: dict, steps: int) -> numpy.ndarray:
    return numpy.arange(steps)[::-1] * (values["num_train_timesteps"] // steps) + values["steps_offset"]


def _ddim_linspace(values: dict, steps: int) -> numpy.ndarray:
    return numpy.linspace(0, values["num_train_timesteps"] - 1, steps).round()[::-1]


def _ddim_trailing(values: dict, steps: int) -> numpy.ndarray:
    total = values["num_train_timesteps"]
    return numpy.arange(total, 0, -total / steps).round() - 1


def _dpm_leading(values: dict, steps: int) -> numpy.ndarray:
    return numpy.arange(steps, 0, -1) * (_dpm_total(values) // (steps + 1)) + values["steps_offset"]


def _dpm_linspace(values: dict, steps: int) -> numpy.ndarray:
    return numpy.linspace(0, _dpm_total(values) - 1, steps + 1).round()[:0:-1]


def _dpm_trailing(values: dict, steps: int) -> numpy.ndarray:
    return numpy.arange(_dpm_total(values), 0, -values["num_train_timesteps"] / steps).round() - 1


def _dpm_total(values: dict) -> int:
    """Training timesteps whose log signal-to-noise ratio log(sqrt(a) / sqrt(1 - a)) reaches `lambda_min_clipped`."""
    alphas = alphas_cumprod(values)
    clipped = torch.log(alphas.sqrt()) - torch.log((1 - alphas).sqrt()) < values["lambda_min_clipped"]
    return values["num_train_timesteps"] - int(clipped.sum())
