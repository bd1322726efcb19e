"""How a sampler will call its model, found out by running it on a few numbers before the run.

A sampler of ComfyUI is a function that calls a model when it likes: once per step, two or three times, or as often as
the errors that it measures ask for. Whoever keeps something of every call has to know how many there will be.
"""

import logging
from types import SimpleNamespace
from typing import NamedTuple

import comfy.samplers
import torch

SHAPE = (1, 4, 4, 4)
# What the stand-in for a model predicts, as shares of its input. A sampler that goes by what it sees calls the model
# otherwise for each.
SHARES = (0.0, 0.5)


class Rehearsal(NamedTuple):
    """The calls of a run.

    Args:
        sigmas: of each call, in order.
        without_shortcut: whether the sampler has the negative prompt evaluated at a cfg of 1 as well.
    """

    sigmas: tuple[float, ...]
    without_shortcut: bool


def rehearse(
    sampler: comfy.samplers.Sampler, sigmas: torch.Tensor, model_sampling: torch.nn.Module
) -> Rehearsal | None:
    """The calls that a sampler will make.

    Args:
        sampler: any; it draws nothing from the global generators.
        sigmas: (n + 1,) of the run; left as they are.
        model_sampling: of the model.

    Returns:
        None for a sampler whose calls depend on what it sees, or that does not run without a real model.
    """
    found = [_StandIn(model_sampling, share).run(sampler, sigmas) for share in SHARES]
    return found[0] if found[0] == found[1] else None


class _StandIn:
    """A guider as a sampler sees it, over a model that predicts a share of its input.

    Args:
        model_sampling: of the real model.
        share: see above.
    """

    def __init__(self, model_sampling: torch.nn.Module, share: float):
        self.inner_model = SimpleNamespace(model_sampling=model_sampling)
        self.model_patcher = SimpleNamespace(model=self.inner_model, get_model_object=lambda name: model_sampling)
        self.cfg, self.conds, self.model_options = 1.0, {}, {}
        self.share, self.sigmas, self.without_shortcut = share, [], False

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, model_options: dict = {}, **_) -> torch.Tensor:
        self.sigmas.append(sigma.flatten()[0].item())
        self.without_shortcut |= bool(model_options.get("disable_cfg1_optimization"))
        denoised = self.share * x
        args = {"denoised": denoised, "cond_denoised": denoised, "uncond_denoised": denoised, "input": x}
        args |= {"sigma": sigma, "model": self.inner_model, "model_options": model_options, "cond_scale": self.cfg}
        for function in model_options.get("sampler_post_cfg_function", []):
            args["denoised"] = function(args)
        return args["denoised"]

    def run(self, sampler: comfy.samplers.Sampler, sigmas: torch.Tensor) -> Rehearsal | None:
        sigmas, generator = sigmas.detach().cpu().clone(), torch.Generator().manual_seed(0)
        noise = torch.randn(SHAPE, generator=generator)
        args = {"model_options": {"transformer_options": {"sample_sigmas": sigmas}}, "seed": 0}
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                sampler.sample(self, sigmas, args, None, noise, torch.zeros(SHAPE), None, disable_pbar=True)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            logging.debug("%s does not run without a model: %s", type(sampler).__name__, error)
            return None
        return Rehearsal(tuple(self.sigmas), self.without_shortcut)
