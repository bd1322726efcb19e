"""What ConsistI2V does to a first frame before encoding it, and the moving crops that lead its camera.

Pictures are ComfyUI images: (B, H, W, 3), values 0..1. Source of the crops: TIGER-AI-Lab/ConsistI2V,
pipeline_conditional_animation.py.
"""

import torch
from torch.nn.functional import interpolate

from .pictures import rgb

ZOOM = 1.5
MOTIONS = ("none", "pan_left", "pan_right", "zoom_in", "zoom_out")


def first_frames(images: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The pictures, scaled until both sides cover the clip and cut around their centre: (B, height, width, 3)."""
    pictures = cover(channels_first(images), width, height)
    return channels_last(_center(pictures, width, height))


def moving_crops(images: torch.Tensor, motion: str, frames: int, width: int, height: int) -> torch.Tensor:
    """A clip per picture in which the camera moves over the still picture: (B, F, height, width, 3).

    Args:
        images: (B, H, W, 3).
        motion: one of `MOTIONS`; "none" repeats the first frame.
        frames: F.
        width, height: of the clip.

    Raises:
        ValueError: unknown motion, or a picture that leaves no room to pan in.
    """
    if motion not in MOTIONS:
        raise ValueError(f"Unknown camera motion {motion!r}. Choose one of: {', '.join(MOTIONS)}.")
    if motion == "none":
        return first_frames(images, width, height).unsqueeze(1).expand(-1, frames, -1, -1, -1)
    crops = _pan if motion.startswith("pan") else _zoom
    clip = crops(channels_first(images), motion, frames, width, height)
    return torch.stack([channels_last(frame) for frame in clip], dim=1)


def _pan(pictures: torch.Tensor, motion: str, frames: int, width: int, height: int) -> list[torch.Tensor]:
    pictures = cover(pictures, width, height)
    room = pictures.shape[-1] - width
    if room < 1:
        raise ValueError(
            f"The picture leaves no room to pan in: scaled to {pictures.shape[-1]}x{pictures.shape[-2]} it is as wide "
            f"as the clip ({width}x{height}). Use a wider picture or a narrower clip."
        )
    shares = [index / frames for index in range(frames)]
    starts = [int(room * (share if motion == "pan_right" else 1 - share)) for share in shares]
    top = (pictures.shape[-2] - height) // 2
    return [pictures[..., top : top + height, start : start + width] for start in starts]


def _zoom(pictures: torch.Tensor, motion: str, frames: int, width: int, height: int) -> list[torch.Tensor]:
    """Centred crops with the clip's shape, between the whole picture and 1 / ZOOM of it, at twice the clip's size."""
    pictures = _center(cover(pictures, 2 * width, 2 * height), 2 * width, 2 * height)
    largest, smallest = 2 * height, int(2 * height // ZOOM)
    clip = []
    for index in range(frames):
        grown = int((largest - smallest) * (index / frames))
        crop_height = largest - grown if motion == "zoom_in" else smallest + grown
        crop_width = round(crop_height * width / height)
        left, top = (2 * width - crop_width) // 2, (2 * height - crop_height) // 2
        crop = pictures[..., top : top + crop_height, left : left + crop_width]
        clip.append(_resize(crop, width, height))
    return clip


def cover(pictures: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Pictures (B, 3, H, W), scaled until both sides cover width x height and one of them fits it."""
    scale = max(width / pictures.shape[-1], height / pictures.shape[-2])
    sides = (int(pictures.shape[-1] * scale + 1e-6), int(pictures.shape[-2] * scale + 1e-6))
    return _resize(pictures, max(sides[0], width), max(sides[1], height))


def _resize(pictures: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Bilinear without antialiasing, as published."""
    return interpolate(pictures, (height, width), mode="bilinear", align_corners=False)


def _center(pictures: torch.Tensor, width: int, height: int) -> torch.Tensor:
    left = round((pictures.shape[-1] - width) / 2)
    top = round((pictures.shape[-2] - height) / 2)
    return pictures[..., top : top + height, left : left + width]


def channels_first(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W, C), C 1 to 4 -> (B, 3, H, W); alpha is dropped, gray is repeated."""
    return rgb(images).movedim(-1, 1)


def channels_last(pictures: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, H, W, 3)."""
    return pictures.movedim(1, -1)
