"""A face and two prompts -> the conditioning that `ConsisIDModel` reads."""

import comfy.sd
import node_helpers
import numpy
import torch
from PIL import Image

from .consisid import IDENTITY, KEY_POINTS, PICTURE, STRENGTH, VISION
from .i2vgenxl_picture import to_pillow
from .pictures import check_pictures

ENCODINGS = ("sample", "mode")
# Pixels that both sides of a clip are multiples of: the VAE's compression times the network's patches.
MULTIPLE = 16
# Frames per latent frame after the first.
TEMPORAL = 4


def check_clip(width: int, height: int, frames: int) -> None:
    """Raise ValueError, with the nearest values that work, for a clip that ConsisID cannot make."""
    for name, value in (("width", width), ("height", height)):
        if value < MULTIPLE or value % MULTIPLE:
            below = max(MULTIPLE, value // MULTIPLE * MULTIPLE)
            raise ValueError(f"{name} {value} is not a multiple of {MULTIPLE}. Use {below} or {below + MULTIPLE}.")
    if frames < 1 or frames % TEMPORAL != 1:
        below = max(1, (frames - 1) // TEMPORAL * TEMPORAL + 1)
        raise ValueError(f"frames {frames} is not 1 more than a multiple of {TEMPORAL}. Use {below} or {below + 4}.")


def stretch(images: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """Pictures (N, H, W, C) in 0..1 scaled to a clip's size as published, whatever their shape: (N, height, width, 3).

    In 8 bits with a Lanczos filter, as diffusers' VaeImageProcessor.
    """
    scaled = [picture.resize((width, height), Image.Resampling.LANCZOS) for picture in to_pillow(images)]
    return torch.stack([torch.from_numpy(numpy.array(picture)) for picture in scaled]).float() / 255


def condition_prompts(
    positive: list,
    negative: list,
    vae: comfy.sd.VAE,
    picture: torch.Tensor,
    key_points: torch.Tensor,
    identity: torch.Tensor,
    vision: list[torch.Tensor],
    width: int,
    height: int,
    strength: float = 1.0,
    encoding: str = "sample",
    seed: int = 0,
) -> tuple[list, list]:
    """Add a face to both prompts: guidance compares texts, the person stays.

    Args:
        positive, negative: ComfyUI conditioning.
        vae: the checkpoint's.
        picture: (1, H, W, 3) in 0..1, the aligned face on white.
        key_points: same shape, the drawn key points of `picture`; networks without `is_kps` do not read them.
        identity: (1, 1280), face recognition and vision embedding side by side.
        vision: five states of the vision tower (1, 577, 1024).
        width, height: of the clip, in pixels.
        strength: factor of what the face adds to the network's own; 0 leaves the picture alone.
        encoding: "sample" draws the pictures' latents from the posterior, as published; "mode" takes its peak.
        seed: of that draw.

    Raises:
        ValueError: a picture that cannot be encoded, an unknown encoding, or a VAE of another family.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"Unknown encoding {encoding!r}. Choose one of: {', '.join(ENCODINGS)}.")
    check_pictures(picture)
    check_pictures(key_points)
    pictures = torch.cat((stretch(picture, width, height), stretch(key_points, width, height)))
    latents = encode_pictures(vae, pictures, encoding, seed)
    values = {
        PICTURE: latents[:1],
        KEY_POINTS: latents[1:],
        IDENTITY: identity,
        VISION: list(vision),
        STRENGTH: float(strength),
    }
    return tuple(node_helpers.conditioning_set_values(prompt, values) for prompt in (positive, negative))


def encode_pictures(vae: comfy.sd.VAE, pictures: torch.Tensor, encoding: str, seed: int) -> torch.Tensor:
    """Unscaled latents (N, C, 1, h, w) of pictures (N, H, W, 3), each a clip of one frame.

    Raises:
        ValueError: another VAE than that of the checkpoint, as Load ConsisID returns it.
    """
    if vae.latent_dim != 3 or not hasattr(vae, "encode_sample"):
        raise ValueError(
            "ConsisID needs the CogVideoX VAE that Load ConsisID returns; another VAE is connected. Connect that one."
        )
    clips = pictures.unsqueeze(1)
    return vae.encode_sample(clips, seed) if encoding == "sample" else vae.encode(clips)
