"""Guidance that changes over the run, as CogVideoX's and ConsisID's pipelines offer it, as a patch of a MODEL.

The guidance at a step is g = 1 + s * (1 - cos(pi * p^5)) / 2 with s the cfg of the sampler node. The two modes differ
in p. With "progress" it goes from 0 to 1 over the run, so that g grows from 1 to 1 + s. With "reference" it is
(N - t) / N with t the timestep, 0 to 999, and N the number of steps, as diffusers' ConsisIDPipeline has it: while t is
far above N, p^5 is large and g jumps about between 1 and 1 + s.
"""

import math

import comfy.model_patcher
import comfy.model_sampling
import comfy.samplers
import torch

from .run_levels import follow_levels, timestep_at

MODES = ("progress", "reference")

# Kinds of the discrete sampling space whose timesteps are no positions in the table of sigmas.
WITHOUT_TIMESTEPS = (comfy.model_sampling.ModelSamplingDiscreteEDM, comfy.model_sampling.StableCascadeSampling)


class DynamicGuidance:
    """Guidance by noise level, as a function that ComfyUI calls after its own guidance (`sampler_post_cfg_function`).

    It depends on the sigma and on nothing that happened before.

    Args:
        mode: see `MODES` and the head of this module.
        steps: N, number of steps of the run; of the mode "reference" only.

    Raises:
        ValueError: unknown mode, or steps below 1.
    """

    def __init__(self, mode: str = "progress", steps: int = 50):
        if mode not in MODES:
            raise ValueError(f"Dynamic CFG: unknown mode {mode!r}. Choose one of: {', '.join(MODES)}.")
        if steps < 1:
            raise ValueError(f"Dynamic CFG: steps is {steps}. Give the number of steps of the run, 1 or more.")
        self.mode, self.steps = mode, steps

    def scale(self, cfg: float, timestep: int, training_timesteps: int = 1000) -> float:
        """The guidance g at a timestep.

        Args:
            cfg: s, the cfg of the sampler node.
            timestep: 0..training_timesteps - 1.
            training_timesteps: of the model.

        Returns:
            1..1 + s. With "progress" and trailing timesteps p is i / N at step i, as far as N divides the training
            timesteps; by the timestep it holds for any schedule and for a part of one.
        """
        if self.mode == "reference":
            position = (self.steps - timestep) / self.steps
        else:
            position = (training_timesteps - 1 - timestep) / training_timesteps
        return 1 + cfg * ((1 - math.cos(math.pi * position**5.0)) / 2)

    def __call__(self, args: dict) -> torch.Tensor:
        """The guided x0 for what ComfyUI hands to a post-cfg function."""
        cfg = args["cond_scale"]
        if cfg <= 1:  # no guidance, and ComfyUI has not evaluated the negative prompt
            return args["denoised"]
        sampling, sigma = args["model"].model_sampling, args["sigma"]
        options, total = args["model_options"].get("transformer_options", {}), len(sampling.sigmas)
        timestep = timestep_at(options, sampling, sigma)
        # What other nodes put in the place of the guidance is asked again, and what the guider added to it stays.
        usual, changed = (self._guided(args, strength) for strength in (cfg, self.scale(cfg, timestep, total)))
        return args["denoised"] - usual + changed

    def _guided(self, args: dict, strength: float) -> torch.Tensor:
        """x0 by ComfyUI's guidance of some strength, without the functions that follow it."""
        options = {**args["model_options"], "sampler_post_cfg_function": []}
        return comfy.samplers.cfg_function(
            args["model"],
            args["cond_denoised"],
            args["uncond_denoised"],
            strength,
            args["input"],
            args["sigma"],
            model_options=options,
            cond=args["cond"],
            uncond=args["uncond"],
        )


def install_dynamic_cfg(
    model: comfy.model_patcher.ModelPatcher, mode: str = "progress", steps: int = 50
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model whose guidance changes over the run; see the head of this module.

    It joins what other nodes install, before or after it: a function in the place of the guidance (such as RescaleCFG)
    gets the changed strength, and functions after the guidance get its result. A cfg of 1 or less stays as it is.

    Args:
        mode, steps: see `DynamicGuidance`.

    Raises:
        ValueError: see `DynamicGuidance`; a model without a table of timesteps, such as a flow model; or a model that
            has this patch already.
    """
    guidance = DynamicGuidance(mode, steps)
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.ModelSamplingDiscrete) or isinstance(sampling, WITHOUT_TIMESTEPS):
        raise ValueError(
            f"Dynamic CFG goes by training timesteps, of which {type(model.model).__name__} has no table. "
            "Use it with epsilon and v-prediction models, such as ConsisID."
        )
    installed = model.model_options.get("sampler_post_cfg_function", [])
    if any(isinstance(function, DynamicGuidance) for function in installed):
        raise ValueError("This model has a Dynamic CFG already. Remove one of the two nodes.")
    model = model.clone()
    follow_levels(model)
    # First, because it replaces the result of the guidance, which the other functions work on.
    model.model_options["sampler_post_cfg_function"] = [guidance, *installed]
    return model
