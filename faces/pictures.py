"""ComfyUI images as the 8-bit pictures that the published face models were trained on, and their scaling.

Pictures are uint8 arrays (H, W, 3), RGB, 0..255. Points lie at pixel centres: (0, 0) is the centre of the first pixel.
"""

import comfy.model_management
import numpy as np
import torch

from ..models.pictures import CHANNELS, picture_flaw, rgb

LANCZOS_TAPS = 8


def to_picture(image: torch.Tensor) -> np.ndarray:
    """An IMAGE as an 8-bit RGB picture (H, W, 3); alpha is dropped, grey is repeated.

    Args:
        image: (H, W, C) or (1, H, W, C), 0..1, with 1 to 4 channels.

    Raises:
        ValueError: another shape, no pixels, or values that are not numbers.
    """
    picture = image[0] if image.ndim == 4 and image.shape[0] == 1 else image
    if picture.ndim != 3 or picture.shape[-1] not in CHANNELS or 0 in picture.shape:
        raise ValueError(
            f"A face is looked for in one picture (height, width, 1 to 4 channels), found {tuple(image.shape)}. "
            "Connect a single image."
        )
    flaw = picture_flaw(picture.unsqueeze(0))
    if flaw:
        raise ValueError(flaw)
    return rgb(picture).float().mul(255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def to_image(picture: np.ndarray) -> torch.Tensor:
    """An 8-bit picture as an IMAGE (1, H, W, 3), 0..1."""
    return to_results(torch.from_numpy(np.array(picture)).float().div(255).unsqueeze(0))


def to_results(values: torch.Tensor) -> torch.Tensor:
    """Values on the device that ComfyUI keeps nodes' results on: the CPU, or with `--gpu-only` the GPU."""
    return values.to(comfy.model_management.intermediate_device())


def limit_long_side(picture: np.ndarray, side: int = 1024) -> np.ndarray:
    """The picture, its longer side cut to `side` pixels; smaller pictures stay as they are.

    Lanczos with 8 taps whatever the scale (OpenCV's INTER_LANCZOS4), sizes rounded down, as ConsisID's preprocessing
    does (diffusers, pipelines/consisid/consisid_utils.py).
    """
    height, width = picture.shape[:2]
    if max(height, width) <= side:
        return picture
    scale = side / max(height, width)
    # Sides of panoramas that would vanish keep one pixel.
    height, width = max(int(height * scale), 1), max(int(width * scale), 1)
    values = _lanczos(picture.astype(np.float32), width, axis=1)
    return _to_bytes(_lanczos(values, height, axis=0))


def resize_bilinear(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """The picture in another size, bilinear between the nearest pixels without smoothing (OpenCV's INTER_LINEAR)."""
    channels_first = torch.from_numpy(np.array(picture)).movedim(-1, 0).unsqueeze(0).float()
    scaled = torch.nn.functional.interpolate(channels_first, (height, width), mode="bilinear", align_corners=False)
    return _to_bytes(scaled[0].movedim(0, -1).numpy())


def _lanczos(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Resize one axis with the Lanczos window of radius 4, its weights normalised, its edge pixels repeated."""
    length = values.shape[axis]
    centers = (np.arange(size) + 0.5) * (length / size) - 0.5
    first = np.floor(centers).astype(int) - LANCZOS_TAPS // 2 + 1
    result = 0
    indices = first[:, None] + np.arange(LANCZOS_TAPS)
    distances = centers[:, None] - indices
    weights = np.sinc(distances) * np.sinc(distances / (LANCZOS_TAPS // 2))
    # In steps of 1/2048, which OpenCV's 8-bit arithmetic has.
    weights = (np.round(weights / weights.sum(axis=1, keepdims=True) * 2048) / 2048).astype(np.float32)
    indices = indices.clip(0, length - 1)
    shape = [1] * values.ndim
    shape[axis] = size
    for tap in range(LANCZOS_TAPS):
        result = result + np.take(values, indices[:, tap], axis=axis) * weights[:, tap].reshape(shape)
    return result


def _to_bytes(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)
