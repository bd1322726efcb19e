"""Clips whose frames are the batch of an image latent, as AnimateDiff and the older ModelScope loader have them."""

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP

MEANINGS = ("clips", "frames")
KEY = "consistent_video_frames_in_batch"


def install(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A copy of a video model that samples a batch of single frames as the frames of one clip.

    Latents that are clips already, of several frames, are sampled as they are.
    """
    model = model.clone()
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _sample_as_one_clip)
    return model


def _sample_as_one_clip(executor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs):
    """Around a sampling run: (F, C, 1, h, w) becomes (1, C, F, h, w) for the run, and its result (F, C, 1, h, w)."""
    if noise.ndim != 5 or noise.shape[2] != 1:
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, *args, **kwargs)
    frames = noise.shape[0]
    if "latent_shapes" in kwargs:
        kwargs["latent_shapes"] = [_as_clip(latent_image).shape]
    mask = _as_clip(denoise_mask) if denoise_mask is not None and denoise_mask.shape[0] == frames else denoise_mask
    clip = executor(_as_clip(noise), _as_clip(latent_image), sampler, sigmas, mask, *args, **kwargs)
    return clip.transpose(0, 2)


def _as_clip(frames: torch.Tensor) -> torch.Tensor:
    """(F, C, 1, h, w) -> (1, C, F, h, w)."""
    return frames.transpose(0, 2).contiguous()
