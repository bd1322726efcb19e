"""What I2VGen-XL does to a picture before encoding it, pixel for pixel (diffusers, pipeline_i2vgen_xl.py).

Pictures are ComfyUI images: (B, H, W, C), C 1 to 4, values 0..1.
"""

import numpy
import torch
from PIL import Image

from .pictures import check_pictures, rgb

__all__ = ["center_crop", "check_pictures", "first_frames", "to_pillow", "vision_pictures"]


def to_pillow(images: torch.Tensor) -> list[Image.Image]:
    """8-bit RGB pictures; alpha is dropped, gray is repeated."""
    arrays = (rgb(images).float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(numpy.ascontiguousarray(array)) for array in arrays]


def center_crop(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Shrink with a box filter until one side fits, then cut the centre out.

    The published rounding may leave a side one pixel short; what is missing is black.
    """
    scale = min(picture.width / width, picture.height / height)
    picture = picture.resize((round(picture.width // scale), round(picture.height // scale)), Image.Resampling.BOX)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def first_frames(images: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """The pictures as the VAE sees them: (B, height, width, 3) in 0..1."""
    return _to_images([center_crop(picture, width, height) for picture in to_pillow(images)])


def vision_pictures(images: torch.Tensor, width: int, size: int) -> torch.Tensor:
    """The pictures as the vision tower sees them before its normalisation: (B, size, size, 3) in 0..1.

    The crop is a square of the clip's width, whatever its height.
    """
    crops = [center_crop(picture, width, width) for picture in to_pillow(images)]
    return _to_images([crop.resize((size, size), Image.Resampling.BILINEAR) for crop in crops])


def _to_images(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(numpy.array(picture)) for picture in pictures]).float() / 255
