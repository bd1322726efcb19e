"""ComfyUI's pictures: (N, H, W, C) with values 0..1 and 1 to 4 channels: gray, gray and alpha, RGB, RGBA."""

import torch

MINIMUM_SIDE = 8
CHANNELS = (1, 2, 3, 4)


def picture_flaw(images: torch.Tensor) -> str | None:
    """What makes a batch of pictures unusable, as a sentence with a remedy; None if nothing does."""
    if images.ndim != 4:
        return (
            f"The picture has the shape {tuple(images.shape)}, expected (pictures, height, width, channels). Check the "
            "node that made it."
        )
    if images.shape[0] == 0:
        return "The image batch is empty. Connect at least one picture."
    if 0 in images.shape[1:3]:
        return f"The picture is {images.shape[2]}x{images.shape[1]} pixels. Check the node that made it."
    if images.shape[-1] not in CHANNELS:
        return f"The picture has {images.shape[-1]} channels. Use a gray, RGB or RGBA picture."
    if not images.is_floating_point():
        kind = str(images.dtype).removeprefix("torch.")
        return f"The picture has values of type {kind}, expected floating-point values from 0 to 1."
    if not all(bool(picture.isfinite().all()) for picture in images):
        return "The picture holds NaN or infinite values. Check the node that made it."
    return None


def check_pictures(images: torch.Tensor, minimum: int = MINIMUM_SIDE) -> None:
    """Raise ValueError for pictures that cannot be encoded, or with a side below `minimum` pixels."""
    flaw = picture_flaw(images)
    if flaw:
        raise ValueError(flaw)
    height, width = images.shape[1:3]
    if min(height, width) < minimum:
        raise ValueError(f"The picture is {width}x{height} pixels. Use one of at least {minimum}x{minimum}.")


def pixels_to_encode(images: torch.Tensor) -> torch.Tensor:
    """Pictures (N, H, W, C) or clips (B, F, H, W, C) for a VAE: gray is repeated; of RGBA, ComfyUI drops alpha.

    Raises:
        ValueError: not a tensor of that kind.
    """
    if not isinstance(images, torch.Tensor) or images.ndim not in (4, 5) or images.shape[-1] not in CHANNELS:
        found = tuple(images.shape) if isinstance(images, torch.Tensor) else type(images).__name__
        raise ValueError(
            f"The VAE encodes pictures (pictures, height, width, channels) of 1 to 4 channels, found {found}. Connect "
            "a node that makes pictures."
        )
    return images if images.shape[-1] >= 3 else rgb(images)


def rgb(images: torch.Tensor) -> torch.Tensor:
    """Pictures (..., C) as colours (..., 3) without alpha; gray is repeated."""
    return images[..., :3] if images.shape[-1] >= 3 else images[..., :1].expand(*images.shape[:-1], 3)


def on_paper(images: torch.Tensor, paper: float = 1.0) -> torch.Tensor:
    """Pictures (..., C) as colours (..., 3), what is transparent in them filled with a gray value, 1 for white."""
    if images.shape[-1] not in (2, 4):
        return rgb(images)
    alpha = images[..., -1:].clamp(0, 1)
    return rgb(images[..., :-1]) * alpha + paper * (1 - alpha)
