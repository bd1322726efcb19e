"""Clips whose frames are the batch of an image latent, as AnimateDiff and the older ModelScope loader have them."""

from collections.abc import Callable

import comfy.model_patcher
import torch

MEANINGS = ("clips", "frames")
KEY = "consistent_video_frames_in_batch"


def mark(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A copy of a video model that samples a batch of single frames as the frames of one clip.

    Latents that are clips already, of several frames, are sampled as they are.
    """
    model = model.clone()
    model.model_options["transformer_options"][KEY] = True
    return model


def are_frames(noise: torch.Tensor, model_options: dict) -> bool:
    """Whether what is sampled are the frames of one clip in the batch, (F, C, 1, h, w)."""
    marked = model_options["transformer_options"].get(KEY, False)
    return marked and noise.ndim == 5 and noise.shape[2] == 1 < noise.shape[0]


def sample_as_clip(
    run: Callable[..., torch.Tensor],
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    sampler: object,
    sigmas: torch.Tensor,
    denoise_mask: torch.Tensor | None,
    *args,
    **kwargs,
) -> torch.Tensor:
    """Do a sampling run over (1, C, F, h, w) in place of frames (F, C, 1, h, w), whose shape the result has again.

    Args:
        run: takes the other arguments, as ComfyUI's guiders hand them to `OUTER_SAMPLE`.
    """
    if "latent_shapes" in kwargs:
        kwargs["latent_shapes"] = [_as_clip(latent_image).shape]
    if denoise_mask is not None and denoise_mask.shape[0] == noise.shape[0]:
        denoise_mask = _as_clip(denoise_mask)
    clip = run(_as_clip(noise), _as_clip(latent_image), sampler, sigmas, denoise_mask, *args, **kwargs)
    return clip.transpose(0, 2)


def _as_clip(frames: torch.Tensor) -> torch.Tensor:
    """(F, C, 1, h, w) -> (1, C, F, h, w)."""
    return frames.transpose(0, 2).contiguous()
