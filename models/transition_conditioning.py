"""Two pictures, two prompts and a frame rate -> the conditioning of clips that lead from one picture to the other."""

import comfy.clip_vision
import comfy.sd
import torch

from .i2vgenxl_conditioning import add_pictures
from .i2vgenxl_picture import vision_pictures
from .motion_predictor import MotionPredictorModel, linear_interpolation
from .pictures import check_pictures


def condition_transition(
    positive: list,
    negative: list,
    vae: comfy.sd.VAE,
    clip_vision: comfy.clip_vision.ClipVisionModel,
    motion_predictor: MotionPredictorModel | None,
    start_images: torch.Tensor,
    end_images: torch.Tensor,
    width: int,
    height: int,
    frames: int,
    fps: float,
    encoding: str = "sample",
    seed: int = 0,
) -> tuple[list, list]:
    """Add the start picture, an image embedding per frame and the frame rate to both prompts of I2VGen-XL.

    The negative prompt gets zeros in place of the embeddings.

    Args:
        positive, negative: ComfyUI conditioning.
        vae: image VAE.
        clip_vision: the tower of the checkpoint (OpenCLIP ViT-H/14 with projection).
        motion_predictor: None: the embeddings of the frames are those of the pictures, interpolated linearly.
        start_images, end_images: (N, H, W, C) in 0..1, one clip per pair; a single one goes with all of the other.
        width, height: of the clip, in pixels.
        frames: of the clip that will be sampled.
        fps: frames per second that the clip is meant for.
        encoding, seed: as of `i2vgenxl_conditioning.condition_prompts`.

    Raises:
        ValueError: pictures that cannot be encoded or do not pair up, more frames than the motion predictor makes, a
            vision tower that it was not trained with, or a VAE without a posterior to draw from.
    """
    if motion_predictor is not None:
        motion_predictor.check_frames(frames)
    count_pairs(start_images, end_images)
    embeddings = predict_embeddings(clip_vision, motion_predictor, start_images, end_images, width, frames)
    return add_pictures(positive, negative, vae, start_images, embeddings, width, height, fps, encoding, seed)


def count_pairs(start_images: torch.Tensor, end_images: torch.Tensor) -> int:
    """How many clips two batches of pictures describe.

    Raises:
        ValueError: a picture that cannot be encoded, or batches of different sizes, neither of them 1.
    """
    check_pictures(start_images)
    check_pictures(end_images)
    starts, ends = len(start_images), len(end_images)
    if starts != ends and 1 not in (starts, ends):
        raise ValueError(
            f"There are {starts} start pictures and {ends} end pictures. Give as many of both, one clip per pair, or "
            "one picture that goes with all of the others."
        )
    return max(starts, ends)


def predict_embeddings(
    clip_vision: comfy.clip_vision.ClipVisionModel,
    motion_predictor: MotionPredictorModel | None,
    start_images: torch.Tensor,
    end_images: torch.Tensor,
    width: int,
    frames: int,
) -> torch.Tensor:
    """Image embeddings (N, frames, D) of clips between pictures (N or 1, H, W, C) that are cropped as I2VGen-XL's."""
    pictures = [vision_pictures(images, width, clip_vision.image_size) for images in (start_images, end_images)]
    encoded = clip_vision.encode_image(torch.cat(pictures))
    embeddings, tokens = (
        _in_pairs(encoded[name], len(start_images)) for name in ("image_embeds", "penultimate_hidden_states")
    )
    if motion_predictor is None:
        return linear_interpolation(*embeddings, frames)
    return motion_predictor.predict(*embeddings, *tokens, frames)


def _in_pairs(rows: torch.Tensor, starts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the start pictures and rows of the end pictures, as many of both."""
    start, end = rows[:starts], rows[starts:]
    clips = max(len(start), len(end))
    return start.expand(clips, *start.shape[1:]), end.expand(clips, *end.shape[1:])
