"""The noise levels at which a run evaluates its model, known on the host before the first step.

A patch that decides by noise level would otherwise read it from the device in every step, and the host would wait there
until everything before that step is computed. Most samplers evaluate the model once per step, at the sigmas that they
are given and in their order, so that counting the calls tells the level.
"""

from collections.abc import Callable

import comfy.k_diffusion.sampling
import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..samplers.free_init import FreeInit
from ..samplers.reference import ReferenceSampler

KEY = "consistent_video_run_levels"

# Functions of comfy.k_diffusion.sampling that evaluate the model once per step, at the sigmas given, in their order. A
# test runs each of them.
ONCE_PER_STEP = frozenset(
    f"sample_{name}"
    for name in (
        "euler",
        "euler_ancestral",
        "euler_cfg_pp",
        "euler_ancestral_cfg_pp",
        "lms",
        "ddpm",
        "lcm",
        "ipndm",
        "ipndm_v",
        "deis",
        "dpmpp_2m",
        "dpmpp_2m_cfg_pp",
        "dpmpp_2m_sde",
        "dpmpp_2m_sde_gpu",
        "dpmpp_2m_sde_heun",
        "dpmpp_2m_sde_heun_gpu",
        "dpmpp_3m_sde",
        "dpmpp_3m_sde_gpu",
        "res_multistep",
        "res_multistep_cfg_pp",
        "res_multistep_ancestral",
        "res_multistep_ancestral_cfg_pp",
        "gradient_estimation",
        "gradient_estimation_cfg_pp",
        "er_sde",
        "sa_solver",
    )
)


class RunLevels:
    """The levels of one run, and which of them is being evaluated.

    Args:
        sigmas: of every evaluation, in order.
        timesteps: theirs; empty for a model without a table of timesteps.
    """

    def __init__(self, sigmas: list[float], timesteps: list[int]):
        self.sigmas, self.timesteps = sigmas, timesteps
        self.position = -1

    @property
    def known(self) -> bool:
        """Whether the evaluation at hand is one of the list."""
        return 0 <= self.position < len(self.sigmas)


def follow_levels(model: comfy.model_patcher.ModelPatcher) -> None:
    """Make every run of a model (a clone of the caller's) keep its levels in the transformer options."""
    if KEY not in model.wrappers.get(WrappersMP.SAMPLER_SAMPLE, {}):
        model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _start)


def sigma_at(options: dict, sigmas: torch.Tensor) -> float:
    """The highest of the sigmas that a model is evaluated at.

    Args:
        options: transformer options of the evaluation.
        sigmas: (B,), on any device; read, which makes the host wait, where the run's levels are not known.
    """
    levels = options.get(KEY)
    return levels.sigmas[levels.position] if levels is not None and levels.known else sigmas.max().item()


def timestep_at(options: dict, sampling: comfy.model_sampling.ModelSamplingDiscrete, sigmas: torch.Tensor) -> int:
    """The training timestep of a model's first sigma; for the arguments see `sigma_at`."""
    levels = options.get(KEY)
    if levels is not None and levels.known and levels.timesteps:
        return levels.timesteps[levels.position]
    return int(sampling.timestep(sigmas.flatten()[:1]).item())


def evaluated_sigmas(
    sampler: comfy.samplers.Sampler, sigmas: torch.Tensor, config: dict | None = None
) -> torch.Tensor | None:
    """Sigmas of a sampler's evaluations of the model, in order; None where they are its own affair.

    Args:
        sigmas: (n + 1,), what the sampler is given.
        config: the model's scheduler configuration, which FreeInit goes by.
    """
    if isinstance(sampler, ReferenceSampler):
        return sigmas[:-1]
    if isinstance(sampler, FreeInit):
        runs = [evaluated_sigmas(sampler.sampler, plan, config) for plan in sampler.plan_runs(sigmas, config)]
        return None if any(run is None for run in runs) else torch.cat(runs)
    sampler = getattr(sampler, "unseeded", sampler)  # noise for each row changes nothing here
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", "")
    published = name in ONCE_PER_STEP and function is getattr(comfy.k_diffusion.sampling, name, None)
    # "churn" raises the noise level before a step
    return sigmas[:-1] if published and not sampler.extra_options.get("s_churn") else None


def _start(executor: Callable, guider, sigmas: torch.Tensor, extra_args: dict, *args, **kwargs) -> torch.Tensor:
    """Wrapper of a sampler's run (`SAMPLER_SAMPLE`); `executor.class_obj` is the sampler."""
    base_model = guider.inner_model
    evaluated = evaluated_sigmas(executor.class_obj, sigmas, getattr(base_model, "scheduler_config", None))
    if evaluated is None:
        return executor(guider, sigmas, extra_args, *args, **kwargs)
    sampling, timesteps = base_model.model_sampling, []
    if isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete):
        timesteps = [int(timestep) for timestep in sampling.timestep(evaluated).tolist()]
    levels = RunLevels(evaluated.tolist(), timesteps)
    extra_args["model_options"].setdefault("transformer_options", {})[KEY] = levels
    return executor(_CountedGuider(guider, levels), sigmas, extra_args, *args, **kwargs)


class _CountedGuider:
    """A guider as a sampler sees it, which counts the sampler's calls."""

    def __init__(self, guider: comfy.samplers.CFGGuider, levels: RunLevels):
        vars(self).update(_guider=guider, _levels=levels)

    def __getattr__(self, name: str):
        return getattr(self._guider, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self._guider, name, value)

    def __call__(self, *args, **kwargs) -> torch.Tensor:
        self._levels.position += 1
        return self._guider(*args, **kwargs)
