"""Empty clips."""

import comfy.model_management
import torch

MAX_FRAMES = 512


def check_size(width: int, height: int, frames: int, multiple: int) -> None:
    """Raise ValueError, with the nearest sizes that work, when a clip of this size cannot be made.

    Args:
        width, height: pixels.
        frames: frames in pixel space.
        multiple: spatial compression of the VAE.
    """
    for name, value in (("width", width), ("height", height)):
        if value < multiple or value % multiple:
            below = max(multiple, value // multiple * multiple)
            raise ValueError(f"{name} {value} is not a multiple of {multiple}. Use {below} or {below + multiple}.")
    if not 1 <= frames <= MAX_FRAMES:
        raise ValueError(
            f"frames {frames} is outside 1..{MAX_FRAMES}. Use 16 for the length the networks were trained on; make "
            "longer videos of several clips."
        )


def empty_latent(vae, width: int, height: int, frames: int, batch_size: int = 1) -> dict:
    """A LATENT of zeros (B, C, F', h, w) with the channels and the compression of a VAE.

    Args:
        vae: `comfy.sd.VAE`; F' = F for image VAEs, 1 + (F - 1) // t for video VAEs that compress time t-fold.
        width, height: pixels, multiples of the VAE's spatial compression.
        frames: 1..MAX_FRAMES.
        batch_size: clips.

    Raises:
        ValueError: see `check_size`; or no clips.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is not a number of clips. Use 1 or more.")
    spatial = vae.spacial_compression_decode()
    temporal = vae.temporal_compression_decode() or 1
    check_size(width, height, frames, spatial)
    shape = (batch_size, vae.latent_channels, 1 + (frames - 1) // temporal, height // spatial, width // spatial)
    return {
        "samples": torch.zeros(shape, device=comfy.model_management.intermediate_device()),
        "downscale_ratio_spacial": spatial,
    }


def last_frame(latent: dict) -> dict:
    """The last frame of a clip LATENT as a clip of one frame: start of the next chunk of a long video.

    Raises:
        ValueError: no clip.
    """
    samples = _clip_of(latent, "The last frame")
    return {"samples": samples[:, :, -1:].clone()}


def join_clips(first: dict, second: dict) -> dict:
    """Two clip LATENTs one after the other, without the first frame of the second, which repeats the last of the first.

    Raises:
        ValueError: no clips, or clips of another size or number.
    """
    before, after = _clip_of(first, "The first clip"), _clip_of(second, "The second clip")
    if before.shape[:2] + before.shape[3:] != after.shape[:2] + after.shape[3:]:
        raise ValueError(
            f"Clips of shape {tuple(before.shape)} and {tuple(after.shape)} (batch, channels, frames, height, width) "
            "cannot be joined. Make both with the same size and batch."
        )
    return {"samples": torch.cat((before, after[:, :, 1:].to(before)), dim=2)}


def _clip_of(latent: dict, subject: str) -> torch.Tensor:
    samples = latent["samples"]
    if samples.ndim != 5:
        raise ValueError(
            f"{subject} needs a latent (batch, channels, frames, height, width), not {tuple(samples.shape)}."
        )
    return samples
