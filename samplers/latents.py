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
        ValueError: see `check_size`.
    """
    spatial = vae.spacial_compression_decode()
    temporal = vae.temporal_compression_decode() or 1
    check_size(width, height, frames, spatial)
    shape = (batch_size, vae.latent_channels, 1 + (frames - 1) // temporal, height // spatial, width // spatial)
    return {
        "samples": torch.zeros(shape, device=comfy.model_management.intermediate_device()),
        "downscale_ratio_spacial": spatial,
    }
