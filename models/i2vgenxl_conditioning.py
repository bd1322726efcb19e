"""A picture, two prompts and a frame rate -> the conditioning that `I2VGenXLModel` reads."""

import comfy.clip_vision
import comfy.sd
import node_helpers
import torch

from .frame_vae import FrameVAE, over_frames
from .i2vgenxl_picture import first_frames, vision_pictures
from .pictures import check_pictures

# Keys of a conditioning entry; here so that the nodes do not import the network.
IMAGE_LATENT = "i2vgenxl_image_latent"
IMAGE_EMBEDDING = "i2vgenxl_image_embedding"
FPS = "i2vgenxl_fps"
ENCODINGS = ("sample", "mode")


def condition_prompts(
    positive: list,
    negative: list,
    vae: comfy.sd.VAE,
    clip_vision: comfy.clip_vision.ClipVisionModel,
    images: torch.Tensor,
    width: int,
    height: int,
    fps: float,
    encoding: str = "sample",
    seed: int = 0,
) -> tuple[list, list]:
    """Add the picture and the frame rate to both prompts; the negative one gets a zero image embedding.

    Args:
        positive, negative: ComfyUI conditioning.
        vae: image VAE.
        clip_vision: the tower of the checkpoint (OpenCLIP ViT-H/14 with projection).
        images: (N, H, W, C) in 0..1, one clip per picture.
        width, height: of the clip, in pixels.
        fps: frames per second that the clip is meant for.
        encoding: "sample" draws the first frame's latent from the posterior, as published; "mode" takes its peak.
        seed: of that draw.

    Raises:
        ValueError: a picture that cannot be encoded, or a VAE without a posterior to draw from.
    """
    check_pictures(images)
    embedding = embed_pictures(clip_vision, images, width)
    return add_pictures(positive, negative, vae, images, embedding, width, height, fps, encoding, seed)


def add_pictures(
    positive: list,
    negative: list,
    vae: comfy.sd.VAE,
    images: torch.Tensor,
    embedding: torch.Tensor,
    width: int,
    height: int,
    fps: float,
    encoding: str,
    seed: int,
) -> tuple[list, list]:
    """Do what `condition_prompts` does with given image embeddings: (N, 1, D), or (N, F, D) with one per frame.

    Raises:
        ValueError: a frame rate of 0 or less, or an image VAE that cannot be used.
    """
    if not fps > 0:
        raise ValueError(f"fps {fps} is not a frame rate. Use 1 or more; lower moves more, 16 is published.")
    frame_vae = vae if isinstance(vae, FrameVAE) else over_frames(vae)
    latent = encode_first_frames(frame_vae, first_frames(images, width, height), encoding, seed)
    values = {IMAGE_LATENT: latent, FPS: float(fps)}
    return (
        node_helpers.conditioning_set_values(positive, {**values, IMAGE_EMBEDDING: embedding}),
        node_helpers.conditioning_set_values(negative, {**values, IMAGE_EMBEDDING: torch.zeros_like(embedding)}),
    )


def encode_first_frames(vae: FrameVAE, pictures: torch.Tensor, encoding: str, seed: int) -> torch.Tensor:
    """Unscaled latents (N, 4, h, w) of pictures (N, H, W, 3)."""
    if encoding == "sample":
        return vae.encode_sample(pictures, seed)
    return vae.encode(pictures).transpose(1, 2).flatten(0, 1)


def embed_pictures(clip_vision: comfy.clip_vision.ClipVisionModel, images: torch.Tensor, width: int) -> torch.Tensor:
    """CLIP image embeddings (N, 1, D) of pictures, cropped as published."""
    pictures = vision_pictures(images, width, clip_vision.image_size)
    return clip_vision.encode_image(pictures)["image_embeds"].unsqueeze(1)
