"""Initial noise of clips, as ComfyUI NOISE objects: shared between the frames, or led by a static video.

A NOISE object has a `seed` and `generate_noise(latent)`, which returns a CPU tensor of the shape and dtype of the
latent's samples.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import torch

from .clip_numbers import rows_of_clips, sign
from .filters import LowPass, mix_low_high

MODES = ("independent", "mixed", "progressive")
TRAINING_TIMESTEPS = 1000


class Noise(Protocol):
    """What ComfyUI's samplers expect of a NOISE."""

    seed: int

    def generate_noise(self, input_latent: dict) -> torch.Tensor:
        """Noise for a LATENT."""


class SharedNoise:
    """Unit noise whose frames have something in common (PYoCo, Ge et al. 2023, arXiv 2305.10474).

    Args:
        seed: seeds ComfyUI's CPU generator, as RandomNoise does.
        mode: see `mix_frames`; independent is the noise of RandomNoise.
        alpha: see `mix_frames`.

    Raises:
        ValueError: unknown mode, or a negative alpha.
    """

    def __init__(self, seed: int, mode: str = "independent", alpha: float = 1.0):
        _check_mode(mode, alpha)
        self.seed, self.mode, self.alpha = seed, mode, alpha

    def generate_noise(self, input_latent: dict) -> torch.Tensor:
        """Noise (B, C, F, H, W) for a LATENT; of any shape when the mode is independent.

        The clips of a batch are drawn one after the other, so that with "batch_index" one of them can be made again.

        Raises:
            ValueError: a latent without a frame axis, unless the mode is independent.
        """
        samples, indices = input_latent["samples"], input_latent.get("batch_index")
        if self.mode == "independent":
            return sign(comfy.sample.prepare_noise(samples, self.seed, indices), input_latent)
        require_frames(samples, f"Noise of mode {self.mode}", "Or use the mode independent.")
        # Some native samplers draw from the global generator and expect that the noise has seeded it.
        generator = torch.manual_seed(self.seed)
        indices = range(len(samples)) if indices is None else indices
        wanted = set(indices)
        clips = {}
        for index in range(max(wanted) + 1):
            clip = self._draw_clip(samples.shape[1:], generator)
            if index in wanted:
                clips[index] = clip
        return sign(torch.stack([clips[index] for index in indices]).to(samples.dtype), input_latent)

    def _draw_clip(self, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
        """One clip (C, F, H, W) float32. Progressive noise draws whole clips of base frames, as the published code."""
        channels, frames, *size = shape
        base = torch.randn(channels, 1 if self.mode == "mixed" else frames, *size, generator=generator)
        independent = torch.randn(shape, generator=generator)
        return mix_frames(self.mode, self.alpha, base, independent)


class FrameInitNoise:
    """Noise whose low frequencies are those of a noised static video (FrameInit, arXiv 2402.04324).

    Args:
        noise: the NOISE that gives the high frequencies and noises the video.
        model: whose noise levels and latent scale apply.
        static_video: LATENT (N, C, F, H, W) or (N, C, H, W), unscaled; the clips of the batch take the N in turn, and
            one frame is repeated to all frames.
        noise_level: training timestep, 0..T-1, to which the video is noised; lower keeps more of it.
        low_pass: the filter.
    """

    def __init__(
        self,
        noise: Noise,
        model: comfy.model_patcher.ModelPatcher,
        static_video: dict,
        noise_level: int,
        low_pass: LowPass,
    ):
        self.noise, self.model, self.static_video = noise, model, static_video
        self.noise_level, self.low_pass = noise_level, low_pass

    @property
    def seed(self) -> int:
        """Seed of the inner noise."""
        return self.noise.seed

    def generate_noise(self, input_latent: dict) -> torch.Tensor:
        """Noise (B, C, F, H, W) for a LATENT.

        Raises:
            ValueError: a latent without a frame axis, a static video of another size, a model that adds no noise, or a
                noise level outside its table.
        """
        samples = input_latent["samples"]
        require_frames(samples, "FrameInit")
        video = fit_video(self.static_video["samples"], samples.shape, input_latent.get("batch_index"))
        sigma = level_sigma(self.model.get_model_object("model_sampling"), self.noise_level)
        noise = self.noise.generate_noise(input_latent)
        video = self.model.model.process_latent_in(video.to(noise.device, torch.float32))
        noised = add_noise(video, noise.float(), sigma)
        mask = self.low_pass.mask(noise.shape[-3:], noise.device)
        return sign(mix_low_high(noised, noise, mask), input_latent)


def mix_frames(mode: str, alpha: float, base: torch.Tensor, independent: torch.Tensor) -> torch.Tensor:
    """Frames of unit noise that have something in common.

    Args:
        mode: "independent": nothing. "mixed": every frame is the base frame and noise of its own, correlation
            a^2 / (1 + a^2) between any two frames. "progressive": every frame is the one before it and noise of its
            own, starting with the base frame.
        alpha: a, from 0 (nothing in common) upwards.
        base: (..., C, F or 1, H, W) unit noise; its first frame is used.
        independent: (..., C, F, H, W) unit noise.

    Returns:
        (..., C, F, H, W), unit variance.

    Raises:
        ValueError: unknown mode, or a negative alpha.
    """
    _check_mode(mode, alpha)
    if mode == "independent":
        return independent
    first = base[..., :1, :, :]
    common = alpha / math.sqrt(1 + alpha**2)
    own = independent / math.sqrt(1 + alpha**2)
    if mode == "mixed":
        return common * first + own
    frames = [first]
    for frame in own.split(1, dim=-3)[1:]:
        frames.append(common * frames[-1] + frame)
    return torch.cat(frames, dim=-3)


def add_noise(clean: torch.Tensor, noise: torch.Tensor, sigma: float) -> torch.Tensor:
    """The variance-preserving state sqrt(a) * clean + sqrt(1 - a) * noise with a = 1 / (1 + sigma^2).

    Args:
        clean: any shape.
        noise: the same shape, unit variance.
        sigma: noise over signal, 0 to infinity.
    """
    angle = math.atan(sigma)
    return math.cos(angle) * clean + math.sin(angle) * noise


def level_sigma(model_sampling: torch.nn.Module, level: int) -> float:
    """Noise over signal at a training timestep, for any kind of model.

    Args:
        model_sampling: of the model.
        level: 0..T-1 with T = 1000; a model with a finer table has its levels at the same shares of it.

    Raises:
        ValueError: a level outside the table, or a model that adds no noise.
    """
    if not 0 <= level < TRAINING_TIMESTEPS:
        raise ValueError(
            f"noise_level is {level}, but training timesteps go from 0 to {TRAINING_TIMESTEPS - 1}. Choose one of them."
        )
    table = model_sampling.sigmas
    return noise_over_signal(model_sampling, table[math.ceil((level + 1) * len(table) / TRAINING_TIMESTEPS) - 1])


def noise_over_signal(model_sampling: torch.nn.Module, sigma: torch.Tensor) -> float:
    """How much noise a model's state holds per unit of signal: sigma itself, or sigma / (1 - sigma) of flow models.

    Args:
        model_sampling: of the model.
        sigma: scalar, one of its noise levels.

    Raises:
        ValueError: a model whose states hold no noise.
    """
    one, none = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    sigma = sigma.detach().cpu().double().reshape(1)
    noise = model_sampling.noise_scaling(sigma, one.clone(), none).item()
    signal = model_sampling.noise_scaling(sigma, none.clone(), one).item()
    if noise == 0 and sigma > 0:
        raise ValueError(
            f"This model ({_kind(model_sampling)}) adds no noise to a latent, so no noise can be prepared for it. "
            "Leave this node out with this model."
        )
    return noise / signal if signal > 0 else math.inf


def require_exploding(model_sampling: torch.nn.Module, subject: str) -> None:
    """Refuse models that do not sample in variance-exploding space, such as flow models.

    Args:
        model_sampling: of the model.
        subject: what cannot work, the first word of the message.

    Raises:
        ValueError: see above.
    """
    if not isinstance(model_sampling, comfy.model_sampling.EPS):
        raise ValueError(
            f"{subject} works with the noise levels of epsilon and v-prediction models; this model samples as "
            f"{_kind(model_sampling)}. Leave it out with this model."
        )


def require_frames(samples: torch.Tensor, subject: str, remedy: str = "") -> None:
    """Refuse latents that are not clips.

    Args:
        samples: expected (B, C, F, H, W).
        subject: what cannot work, the first words of the message.
        remedy: another way out, the last sentence.

    Raises:
        ValueError: another number of axes, or a latent of several parts.
    """
    if samples.is_nested or samples.ndim != 5:
        found = "a latent of several parts" if samples.is_nested else f"one of shape {tuple(samples.shape)}"
        message = (
            f"{subject} needs a clip latent (batch, channels, frames, height, width), but found {found}. Connect one, "
            f"such as that of Empty Clip Latent. {remedy}"
        )
        raise ValueError(message.strip())


def fit_video(video: torch.Tensor, shape: torch.Size, numbers: Sequence[int] | None = None) -> torch.Tensor:
    """A static video in the shape of the clips that are sampled, which take the N in turn.

    Args:
        video: (N, C, F or 1, H, W) or (N, C, H, W); B is a multiple of N, unless `numbers` are given.
        shape: (B, C, F, H, W).
        numbers: of the B clips in the batch that they were taken from ("batch_index"); None: they are the whole batch.

    Raises:
        ValueError: a size that neither agrees nor can be repeated.
    """
    found = tuple(video.shape)
    if video.ndim == 4:
        video = video.unsqueeze(2)
    shared = numbers is not None or shape[0] % max(1, video.shape[0]) == 0
    agrees = (
        video.ndim == 5
        and shared
        and all(
            size == wanted or (size == 1 and axis == 2)
            for axis, (size, wanted) in enumerate(zip(video.shape, shape))
            if axis > 0
        )
    )
    if not agrees:
        raise ValueError(
            f"The static video is {found}, the latent to sample is {tuple(shape)} (batch, channels, frames, height, "
            "width). Encode the static video with the model's VAE at the width, height and frames of the latent; one "
            "frame, or one clip for a whole batch, also fits."
        )
    return rows_of_clips(video, range(shape[0]) if numbers is None else numbers).expand(shape)


def _kind(model_sampling: torch.nn.Module) -> str:
    return ", ".join(base.__name__ for base in type(model_sampling).__bases__)


def _check_mode(mode: str, alpha: float) -> None:
    if mode not in MODES:
        raise ValueError(f"Unknown noise mode {mode!r}. Choose one of: {', '.join(MODES)}.")
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is {alpha}. Choose a value from 0 (frames of their own) upwards; 1 is usual.")
