"""What a clip network says about latents that are not the clips it samples, before it starts."""

import comfy.latent_formats
import torch

REMEDY = "Sample the latent of Empty Clip Latent, or the one that the conditioning node of the model returns"


def check_clip_latents(latents: torch.Tensor, latent_format: comfy.latent_formats.LatentFormat) -> None:
    """Raise ValueError unless latents to sample are clips (B, C, F, h, w) of a latent format.

    Several clips of one frame are refused: ComfyUI makes them of the image latents in whose batch the frames of a clip
    stand, as with AnimateDiff. They would be pictures that have nothing in common.
    """
    shape, channels = tuple(latents.shape), latent_format.latent_channels
    if latents.ndim != 5 or 0 in shape:
        raise ValueError(
            f"The latent to sample has the shape {shape}, expected (clips, {channels}, frames, height, width). "
            f"{REMEDY}."
        )
    if shape[1] != channels:
        raise ValueError(
            f"The latent to sample has {shape[1]} channels, but this model's latents have {channels}: another VAE made "
            f"it. Encode with the VAE of the checkpoint. {REMEDY}."
        )
    if shape[0] > 1 and shape[2] == 1:
        raise ValueError(
            f"The latent to sample holds {shape[0]} clips of 1 frame each that have nothing in common. It "
            f"comes from a node for pictures, such as Empty Latent Image. {REMEDY}, with frames {shape[0]} and "
            "batch_size 1. To sample single frames on purpose, take them one by one (Latent From Batch)."
        )


def check_clip_count(pictures: int, clips: int) -> None:
    """Raise ValueError when the clips to sample cannot be shared out among the pictures of a prompt."""
    if clips > pictures and clips % pictures:
        raise ValueError(
            f"The prompt holds {pictures} pictures, but the latent to sample holds {clips} clips. Sample as many clips "
            f"as there are pictures, or a multiple of it: {REMEDY[0].lower()}{REMEDY[1:]}."
        )


def check_picture_latent(what: str, picture: torch.Tensor, latents: torch.Tensor, node: str) -> None:
    """Raise ValueError unless a picture's latent (N, C, ..., h, w) has the channels and the size of latents to sample.

    Args:
        what: the picture is, in the message.
        node: that prepared it.
    """
    if picture.shape[1] != latents.shape[1]:
        raise ValueError(
            f"The {what} was encoded to {picture.shape[1]} channels, but the latent to sample has {latents.shape[1]}: "
            f"another VAE made it. Connect the VAE of the checkpoint to {node}."
        )
    if picture.shape[-2:] != latents.shape[-2:]:
        raise ValueError(
            f"The {what} was prepared for latents of {tuple(picture.shape[-2:])} (height, width), but the latent to "
            f"sample has {tuple(latents.shape[-2:])}. Sample the latent of {node}."
        )
