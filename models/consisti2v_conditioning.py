"""A first frame, two prompts and a frame stride -> the conditioning that `ConsistI2VModel` reads."""

import comfy.sd
import node_helpers
import torch

from .consisti2v_picture import moving_crops
from .frame_vae import FrameVAE, over_frames
from .pictures import check_pictures

# Keys of a conditioning entry; here so that the nodes do not import the network.
FIRST_FRAME = "consisti2v_first_frame"
FRAME_STRIDE = "consisti2v_frame_stride"
STRIDES = (1, 60)


def condition_prompts(
    positive: list, negative: list, static_video: torch.Tensor, frame_stride: int
) -> tuple[list, list]:
    """Add the first frame of a static video (unscaled latent (N, 4, F, h, w)) and the frame stride to both prompts.

    Raises:
        ValueError: a stride outside `STRIDES`.
    """
    if not STRIDES[0] <= frame_stride <= STRIDES[1]:
        raise ValueError(f"frame_stride {frame_stride} is outside {STRIDES[0]}..{STRIDES[1]}; trained on 1 to 5.")
    values = {FIRST_FRAME: static_video[:, :, :1], FRAME_STRIDE: frame_stride}
    return tuple(node_helpers.conditioning_set_values(prompt, values) for prompt in (positive, negative))


def static_video(
    vae: comfy.sd.VAE,
    images: torch.Tensor | None,
    first_frame: dict | None,
    motion: str,
    frames: int,
    width: int,
    height: int,
    seed: int = 0,
) -> torch.Tensor:
    """The static video of a picture or of a first-frame LATENT, whichever is given: unscaled (N, 4, F, h, w).

    Raises:
        ValueError: none or both given, a latent with camera motion or of another size, or a picture that cannot be
            encoded.
    """
    if (images is None) == (first_frame is None):
        raise ValueError("Connect either first_frame (a picture) or first_frame_latent, and only one of the two.")
    if images is not None:
        check_pictures(images)
        return static_video_of_picture(vae, images, motion, frames, width, height, seed)
    if motion != "none":
        raise ValueError(f"camera_motion {motion} needs a picture: connect first_frame, or set camera_motion to none.")
    latent = static_video_of_latent(first_frame["samples"], frames)
    if latent.shape[-2:] != (height // 8, width // 8):
        raise ValueError(
            f"first_frame_latent is {latent.shape[-1] * 8}x{latent.shape[-2] * 8} pixels, but the clip is "
            f"{width}x{height}. Use the size of the clip that it comes from."
        )
    return latent


def static_video_of_picture(
    vae: comfy.sd.VAE, images: torch.Tensor, motion: str, frames: int, width: int, height: int, seed: int = 0
) -> torch.Tensor:
    """Encode a picture as a video of `frames` frames that stands still or follows a moving crop.

    Every frame of a moving crop is a draw from the posterior, as published; a picture that stands still is drawn once.

    Args:
        vae: image VAE.
        images: (N, H, W, 3) in 0..1.
        motion: one of `consisti2v_picture.MOTIONS`.
        frames, width, height: of the clip.
        seed: of the draws.

    Returns:
        Unscaled latents (N, 4, F, h, w).
    """
    frame_vae = vae if isinstance(vae, FrameVAE) else over_frames(vae)
    clips = moving_crops(images, motion, 1 if motion == "none" else frames, width, height)
    latents = frame_vae.encode_sample(clips.flatten(0, 1), seed).unflatten(0, clips.shape[:2]).transpose(1, 2)
    return latents.expand(-1, -1, frames, -1, -1) if motion == "none" else latents


def static_video_of_latent(first_frame: torch.Tensor, frames: int) -> torch.Tensor:
    """A first-frame latent (N, 4, 1, h, w) that stands still for `frames` frames.

    Raises:
        ValueError: a latent of another shape.
    """
    if first_frame.ndim != 5 or first_frame.shape[2] != 1:
        raise ValueError(
            f"first_frame_latent has shape {tuple(first_frame.shape)}, expected one frame "
            "(batch, 4, 1, height, width). Connect Last Frame."
        )
    return first_frame.expand(-1, -1, frames, -1, -1)
