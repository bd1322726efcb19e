"""What PhotoMaker does to a picture before its vision tower sees it: the CLIP image processor of transformers.

That is Pillow's bicubic filter on 8-bit values, the long side rounded down. `comfy.clip_model.clip_preprocess` rounds
it to nearest, which moves the crop of most pictures by half a pixel.
"""

import numpy
import torch
from PIL import Image

from .i2vgenxl_picture import to_pillow
from .pictures import check_pictures

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(images: torch.Tensor, size: int = 224) -> torch.Tensor:
    """Resize the short side to `size`, cut the centre out, subtract CLIP's mean and divide by its deviation.

    Args:
        images: (N, H, W, C) in 0..1; alpha is dropped, gray repeated.

    Returns:
        (N, 3, size, size) on the CPU, fp32.

    Raises:
        ValueError: no picture, or one that is too small, of other channels or not finite.
    """
    check_pictures(images)
    crops = [numpy.asarray(_centre(picture, size)) for picture in to_pillow(images)]
    values = torch.from_numpy(numpy.stack(crops)).movedim(-1, 1).float() / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def _centre(picture: Image.Image, size: int) -> Image.Image:
    short = min(picture.size)
    width, height = (size if side == short else int(size * side / short) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
