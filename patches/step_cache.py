"""Steps of a run that reuse what the network predicted in an earlier one, as a patch of a ConsisID MODEL.

The idea is that of TeaCache (Liu et al. 2024, arXiv 2411.19108): how far the network's input has moved since the last
computed step tells how far its output has, and below a threshold the network is not called. Three things differ.

The move is the relative L1 change of the noisy clip that the noise level makes in a clip of unit variance. Its input is
cos(phi) * x0 + sin(phi) * noise with phi = atan(sigma), so that this is a difference of angles, of which a run has
pi / 2. It holds for samplers that add noise as they go, whose clip changes in every step though what it shows does not.

There are no coefficients fitted to one checkpoint.

What stays is the predicted clean clip x0, not the difference of output and input: this network predicts v, which turns
with phi while x0 stands. With DDIM, the steps up to the next computed one are then exactly one large step.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

from ..models.consisid import ConsisIDModel
from .run_levels import follow_levels, sigma_at

KEY = "consistent_video_step_cache"


def moved(sigma: float, previous: float) -> float:
    """How far the input of the network moves between two noise levels, 0..pi / 2; see the head of this module."""
    return abs(math.atan(sigma) - math.atan(previous))


class Prediction(NamedTuple):
    """The last one for a prompt.

    Args:
        sigma: the noise level it was made at.
        denoised: x0 (B, C, F', h, w).
    """

    sigma: float
    denoised: torch.Tensor


class Run:
    """The predictions of one sampling run by prompt.

    Args:
        first, last: sigmas; predictions are reused at `first` and below, above `last`.
    """

    def __init__(self, first: float, last: float):
        self.first, self.last = first, last
        self.predictions: dict[object, Prediction] = {}


class StepCache:
    """The patch; it keeps nothing itself, a run lasts as long as the guider's options.

    Args:
        threshold: 0..1, how far the input moves until the network is called again; see the head of this module.
        start_percent, end_percent: 0..1, share of the run (of the training timesteps) where predictions are reused.

    Raises:
        ValueError: a value outside its range, or an end that is not after the start.
    """

    def __init__(self, threshold: float = 0.1, start_percent: float = 0.1, end_percent: float = 0.95):
        values = {"threshold": threshold, "start_percent": start_percent, "end_percent": end_percent}
        for name, value in values.items():
            if not 0 <= value <= 1:
                raise ValueError(f"Step Cache: {name} is {value}. Choose a value from 0 to 1.")
        if start_percent >= end_percent:
            raise ValueError(
                f"Step Cache: start_percent {start_percent} is not below end_percent {end_percent}. Choose an end "
                "after the start; a threshold of 0 turns the cache off."
            )
        self.threshold, self.start_percent, self.end_percent = threshold, start_percent, end_percent

    def start_run(self, executor: Callable, noise, latent_image, sampler, sigmas, *args, **kwargs) -> torch.Tensor:
        """Wrapper of a sampling run (`OUTER_SAMPLE`); `executor.class_obj` is the guider."""
        guider = executor.class_obj
        sampling = guider.model_patcher.get_model_object("model_sampling")
        start, end = (sampling.percent_to_sigma(percent) for percent in (self.start_percent, self.end_percent))
        # The last step is computed whatever its noise level.
        run = Run(start, max(end, sigmas[-2:].max().item()))
        guider.model_options["transformer_options"][KEY] = run
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def predict(
        self,
        executor: Callable,
        x,
        t,
        c_concat=None,
        c_crossattn=None,
        control=None,
        transformer_options=None,
        **kwargs,
    ) -> torch.Tensor:
        """Wrapper of a call of the model (`APPLY_MODEL`).

        Args:
            x: noisy clips (N * B, C, F', h, w) of N prompts.
            t: their sigmas (N * B,).

        Returns:
            x0 of the same shape. The network is called for all prompts when one of them needs it.
        """
        options = transformer_options or {}
        run, names = options.get(KEY), options.get("uuids")
        if run is None or names is None:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        sigma = sigma_at(options, t)
        known = [run.predictions.get(name) for name in names]
        if run.last < sigma <= run.first and all(self._holds(prediction, sigma) for prediction in known):
            return torch.cat([prediction.denoised for prediction in known])
        denoised = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        for name, clips in zip(names, denoised.chunk(len(names))):
            run.predictions[name] = Prediction(sigma, clips)
        return denoised

    def _holds(self, prediction: Prediction | None, sigma: float) -> bool:
        return prediction is not None and moved(sigma, prediction.sigma) < self.threshold


def install_step_cache(
    model: comfy.model_patcher.ModelPatcher,
    threshold: float = 0.1,
    start_percent: float = 0.1,
    end_percent: float = 0.95,
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model that skips calls of the network; see the head of this module.

    The first and the last step are always computed. Which others are depends on the schedule alone, so that prompts
    evaluated together or apart and clips in a batch or alone give the same.

    Args:
        model: a ConsisID.
        threshold, start_percent, end_percent: see `StepCache`; with a threshold of 0 the clone has no patch.

    Raises:
        ValueError: see `StepCache`; a model that is no ConsisID, or that has this patch already.
    """
    cache = StepCache(threshold, start_percent, end_percent)
    if not isinstance(model.model, ConsisIDModel):
        raise ValueError(
            f"Step Cache is made for ConsisID, and this is a {type(model.model).__name__}. Connect the model of Load "
            "ConsisID; ComfyUI's EasyCache serves others."
        )
    if model.wrappers.get(WrappersMP.APPLY_MODEL, {}).get(KEY):
        raise ValueError("This model has a Step Cache already. Remove one of the two nodes.")
    model = model.clone()
    if threshold:
        follow_levels(model)
        model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, cache.start_run)
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, cache.predict)
    return model
