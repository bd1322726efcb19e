"""Samplers that follow the published pipelines step by step, as ComfyUI SAMPLER objects.

ComfyUI's samplers work in variance-exploding space, x = x0 + sigma * noise. The published samplers work in
variance-preserving space, x = sqrt(a) * x0 + sqrt(1 - a) * noise with a = 1 / (1 + sigma^2), and start from
unit-variance noise. Here the state is kept in the second space, and only the model sees the first.
"""

import copy
import math
from collections.abc import Callable, Sequence

import comfy.k_diffusion.sampling
import comfy.model_sampling
import comfy.samplers
import torch

from . import cogvideox, schedules
from .step_noise import RowNoise, row_seeds

# A model without a scheduler configuration: the last step ends at alpha 1, nothing is clipped.
NO_CONFIG = {"clip_sample": False}

# Relative difference below which two alphas are one noise level: sigmas are float32, and the smallest published betas
# are forty times larger.
SAME_LEVEL = 1e-6


class DDIM:
    """DDIM (Song et al. 2020, arXiv 2010.02502) with the checkpoint's own final alpha, clipping and thresholding.

    Over the sigmas of `schedules.reference_sigmas` it agrees with diffusers' DDIMScheduler wherever that steps from one
    visited timestep to the next: leading spacing always, trailing spacing when the steps divide the training timesteps.
    (Diffusers steps to t - T // steps, which with linspace spacing is rarely the timestep it visits next.)

    Args:
        config: the scheduler configuration.
        sigmas: (n + 1,); only their alphas matter here.
        alphas: n + 1 values, alpha of every sigma.
        eta: 0 is deterministic, 1 adds as much noise as DDPM.
    """

    def __init__(self, config: dict, sigmas: torch.Tensor, alphas: list[float], eta: float = 0.0):
        self.config, self.alphas, self.eta = schedules.settings(config), alphas, eta

    def limit(self, clean: torch.Tensor) -> torch.Tensor:
        """Clip x0, or threshold it per sample (Saharia et al. 2022, arXiv 2205.11487), as the configuration says."""
        if self.config["thresholding"]:
            magnitudes = clean.abs().flatten(1).float()
            bounds = torch.quantile(magnitudes, self.config["dynamic_thresholding_ratio"], dim=1)
            bounds = bounds.clamp(1.0, self.config["sample_max_value"]).to(clean.dtype)
            bounds = bounds.view(-1, *[1] * (clean.ndim - 1))
            return clean.clamp(-bounds, bounds) / bounds
        if self.config["clip_sample"]:
            return clean.clamp(-self.config["clip_sample_range"], self.config["clip_sample_range"])
        return clean

    def step(
        self,
        number: int,
        state: torch.Tensor,
        clean: torch.Tensor,
        direction: torch.Tensor,
        draw: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The next state, given x0 and the noise (eq. 12, with fresh noise as of eq. 16).

        Args:
            number: of the step, from 0.
            state: not used.
            clean, direction: (B, C, ...), x0 and the noise predicted.
            draw: unit noise of a tensor's shape.
        """
        alpha, next_alpha, variance = self.alphas[number], self.alphas[number + 1], 0.0
        # An inverted schedule, whose noise grows, takes no fresh noise; nor does the step from timestep 0 to its own
        # alpha, where that is the final one.
        if next_alpha - alpha > SAME_LEVEL * next_alpha:
            variance = self.eta**2 * (1 - next_alpha) / (1 - alpha) * (1 - alpha / next_alpha)
        following = math.sqrt(next_alpha) * clean + math.sqrt(1 - next_alpha - variance) * direction
        return following + math.sqrt(variance) * draw(following) if variance > 0 else following


ALGORITHMS = {"ddim": DDIM, "cogvideox_ddim": cogvideox.CogVideoXDDIM, "cogvideox_dpm": cogvideox.CogVideoXDPM}
CHOICES = ("auto", *ALGORITHMS)

# What "auto" takes for a scheduler class of a checkpoint; DDIM for every other.
AUTOMATIC = {"CogVideoXDDIMScheduler": "cogvideox_ddim", "CogVideoXDPMScheduler": "cogvideox_dpm"}


class ReferenceSampler(comfy.samplers.Sampler):
    """The sampler of a published pipeline.

    Args:
        algorithm: a key of `ALGORITHMS`; "auto" is the one of the checkpoint's scheduler class.
        eta: share of fresh noise in each DDIM step: 0 is deterministic, 1 adds as much noise as DDPM.

    Raises:
        ValueError: unknown algorithm, or eta outside 0..1.
    """

    def __init__(self, algorithm: str = "auto", eta: float = 0.0):
        if algorithm not in CHOICES:
            raise ValueError(f"Unknown algorithm {algorithm!r}. Choose one of: {', '.join(CHOICES)}.")
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta is {eta}. Choose a value from 0 (deterministic) to 1 (as random as DDPM).")
        self.algorithm, self.eta, self.seeds = algorithm, eta, None

    def seeded(self, seeds: Sequence[int] | None) -> "ReferenceSampler":
        """A copy that draws the noise of its steps from one seed per clip, in place of those of `row_seeds`."""
        sampler = copy.copy(self)
        sampler.seeds = seeds
        return sampler

    @torch.no_grad()
    def sample(
        self,
        model_wrap: comfy.samplers.CFGGuider,
        sigmas: torch.Tensor,
        extra_args: dict,
        callback: Callable[[int, torch.Tensor, torch.Tensor, int], None] | None,
        noise: torch.Tensor,
        latent_image: torch.Tensor | None = None,
        denoise_mask: torch.Tensor | None = None,
        disable_pbar: bool = False,
        **options,
    ) -> torch.Tensor:
        """Denoise, as ComfyUI's guiders call it.

        Args:
            model_wrap: a guider; predicts x0 from a variance-exploding state, and carries the model as `inner_model`.
            sigmas: (n + 1,), the noise level before each step, then the one to end at.
            extra_args: keyword arguments of the model; "seed" also seeds the noise that steps add, which every clip
                draws by itself: see `step_noise.row_seeds`.
            callback: called after each prediction with (step, x0, variance-exploding state, n).
            noise: (B, C, ...), unit variance, or zero when `latent_image` is already noisy.
            latent_image: same shape. All zero: start from `noise` alone at unit variance. Otherwise start from it with
                noise at sigmas[0].
            denoise_mask: same shape, 1 where to denoise, 0 where to keep `latent_image`.
            disable_pbar: hide the progress bar.
            options: what a newer ComfyUI adds; not used.

        Returns:
            The latent (B, C, ...) when the sigmas end at 0, else the variance-exploding state at the last sigma, from
            which a run over the remaining sigmas with zero noise continues.

        Raises:
            ValueError: a model that does not sample in variance-exploding space, or an eta or sigmas that the algorithm
                does not take.
        """
        base_model = model_wrap.inner_model
        _require_exploding(base_model.model_sampling)
        config = schedules.settings(getattr(base_model, "scheduler_config", NO_CONFIG))
        if sigmas.ndim != 1:
            raise ValueError(
                f"The sigmas have the shape {tuple(sigmas.shape)}, expected a row of noise levels. Connect Reference "
                "Scheduler or another scheduler."
            )
        given = sigmas.cpu()
        levels = given.tolist()
        alphas = _alphas(levels, base_model.model_sampling, config)
        algorithm = self._start_algorithm(config, given, alphas)
        latent_image = torch.zeros_like(noise) if latent_image is None else latent_image
        model = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        model.latent_image, model.noise = latent_image, noise
        model_args = {**extra_args, "denoise_mask": denoise_mask}
        seeds = row_seeds(extra_args.get("seed"), noise) if self.seeds is None else self.seeds
        draw = RowNoise(seeds)

        state = _start(noise, latent_image, levels[0], alphas[0])
        for step in comfy.k_diffusion.sampling.trange(len(levels) - 1, disable=disable_pbar):
            exploded = state * math.sqrt(1 + levels[step] ** 2)
            denoised = model(exploded, sigmas[step] * state.new_ones(state.shape[0]), **model_args)
            clean, direction = _predictions(
                denoised, state, exploded, levels[step], alphas[step], base_model.model_sampling
            )
            clean = algorithm.limit(clean)
            if callback is not None:
                callback(step, clean, exploded, len(levels) - 1)
            state = algorithm.step(step, state, clean, direction, draw)
            if levels[step + 1] == 0 and denoise_mask is not None:
                # The final alpha would leave its trace of noise, and clipping its mark, on what is to be kept.
                state = torch.where(denoise_mask == 0, denoised, state)
        return state * math.sqrt(1 + levels[-1] ** 2)

    def _start_algorithm(
        self, config: dict, sigmas: torch.Tensor, alphas: list[float]
    ) -> DDIM | cogvideox.CogVideoXDDIM:
        """The algorithm for one run, so that nothing it remembers outlives the run."""
        name = AUTOMATIC.get(config["_class_name"], "ddim") if self.algorithm == "auto" else self.algorithm
        return ALGORITHMS[name](config, sigmas, alphas, self.eta)


class ReferenceDDIM(ReferenceSampler):
    """DDIM for any scheduler class; see `DDIM`.

    Raises:
        ValueError: eta outside 0..1.
    """

    def __init__(self, eta: float = 0.0):
        super().__init__("ddim", eta)


def reference_sampler(algorithm: str = "auto", eta: float = 0.0) -> comfy.samplers.Sampler:
    """The sampler of a published pipeline; see `ReferenceSampler`."""
    return ReferenceSampler(algorithm, eta)


def _alphas(levels: list[float], model_sampling: torch.nn.Module, config: dict) -> list[float]:
    """Alpha of every sigma. A last sigma of 0 gets the final alpha, the stand-in for infinity gets 0."""
    alphas = [0.0 if _is_terminal(level, model_sampling) else 1 / (1 + level**2) for level in levels]
    if levels[-1] == 0:
        alphas[-1] = schedules.final_alpha(config)
    return alphas


def _require_exploding(model_sampling: torch.nn.Module) -> None:
    """Refuse models that do not sample in variance-exploding space, such as flow models."""
    if not isinstance(model_sampling, comfy.model_sampling.EPS):
        found = ", ".join(base.__name__ for base in type(model_sampling).__bases__)
        raise ValueError(
            f"The reference sampler steps epsilon and v-prediction models; this model samples as {found}. "
            "Use a native sampler, such as euler, with it."
        )


def _is_terminal(level: float, model_sampling: torch.nn.Module) -> bool:
    """Whether a sigma stands for zero signal-to-noise: recognised by its value, which no other published table holds.

    An epsilon model has no x0 there and keeps the finite value.
    """
    predicts_signal = isinstance(model_sampling, comfy.model_sampling.V_PREDICTION | comfy.model_sampling.X0)
    return predicts_signal and math.isclose(level, schedules.ZERO_SNR_SIGMA, rel_tol=1e-4)


def _start(noise: torch.Tensor, latent_image: torch.Tensor, level: float, alpha: float) -> torch.Tensor:
    """The first variance-preserving state."""
    unmixed = ~latent_image.any()
    if alpha == 0:
        unmixed = unmixed | noise.any()
    # a choice between tensors, because one between branches makes the host wait
    return torch.where(unmixed, noise, (latent_image + level * noise) / math.sqrt(1 + level**2))


def _predictions(
    denoised: torch.Tensor,
    state: torch.Tensor,
    exploded: torch.Tensor,
    level: float,
    alpha: float,
    model_sampling: torch.nn.Module,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The x0 and the noise that a prediction sees in the state."""
    if alpha > 0:
        return denoised, (exploded - denoised) / level
    # At alpha 0 the state is all noise. A v-prediction model's x0 is -v, but ComfyUI computed
    # sqrt(a) * state - sqrt(1 - a) * v with the stand-in's small a.
    if isinstance(model_sampling, comfy.model_sampling.V_PREDICTION):
        residue = schedules.ZERO_SNR_ALPHA
        denoised = (denoised - math.sqrt(residue) * state) / math.sqrt(1 - residue)
    return denoised, state
