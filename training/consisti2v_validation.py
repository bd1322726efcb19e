"""Clips that a training draws to look at, as the nodes draw them."""

from fractions import Fraction
from pathlib import Path

import comfy.model_patcher
import numpy
import torch
from comfy_api.latest import InputImpl, Types
from PIL import Image, ImageOps

from ..models.consisti2v_conditioning import condition_prompts, static_video
from ..samplers import latents, reference, schedules
from ..samplers.filters import LowPass
from ..samplers.guidance import ImageTextGuider
from ..samplers.noise import FrameInitNoise, SharedNoise
from .clip_encoder import ClipEncoder
from .settings import ConsistI2VSettings

# FrameInit's filter as published with ConsistI2V.
LOW_PASS = LowPass("gaussian", 4, 0.25, 0.25)
FRAME_RATE = Fraction(8)


@torch.no_grad()
def draw_clips(
    model: comfy.model_patcher.ModelPatcher,
    encoder: ClipEncoder,
    settings: ConsistI2VSettings,
    pictures: list[torch.Tensor],
    folder: Path,
) -> dict[str, torch.Tensor]:
    """Draw the validation clips of some settings and write them into a folder as clip_00.mp4, clip_01.mp4, ...

    Args:
        pictures: first frames (1, H, W, 3) of the settings' clips.

    Returns:
        The frames (F, H, W, 3) in 0..1 of every clip by its file's stem.
    """
    drawn = {}
    for number, (wanted, picture) in enumerate(zip(settings.validation.clips, pictures)):
        frames = draw_clip(model, encoder, settings, wanted.prompt, picture)
        name = f"clip_{number:02}"
        video = InputImpl.VideoFromComponents(Types.VideoComponents(images=frames, frame_rate=FRAME_RATE))
        video.save_to(str(folder / f"{name}.mp4"))
        drawn[name] = frames
    return drawn


def draw_clip(
    model: comfy.model_patcher.ModelPatcher,
    encoder: ClipEncoder,
    settings: ConsistI2VSettings,
    prompt: str,
    picture: torch.Tensor,
) -> torch.Tensor:
    """The frames (F, H, W, 3) in 0..1 of one clip: ConsistI2V Conditioning, noise, guider, reference sampler, VAE."""
    validation, data, clip, vae = settings.validation, settings.data, encoder.clip, encoder.vae
    prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (prompt, validation.negative)]
    still = static_video(vae, picture, None, "none", data.frames, data.width, data.height, validation.seed)
    positive, negative = condition_prompts(*prompts, still, validation.frame_stride)
    noise = SharedNoise(validation.seed, settings.noise.mode, settings.noise.alpha)
    if validation.frame_init is not None:
        noise = FrameInitNoise(noise, model, {"samples": still}, validation.frame_init, LOW_PASS)
    guider = ImageTextGuider(model, validation.cfg_text, validation.cfg_image, 0.0)
    guider.set_conds(positive, negative)
    empty = latents.empty_latent(vae, data.width, data.height, data.frames)
    sigmas = schedules.reference_sigmas(model.model.scheduler_config, validation.steps, 1.0)
    sampler = reference.reference_sampler("auto", 0.0)
    samples = guider.sample(
        noise.generate_noise(empty), empty["samples"], sampler, sigmas, disable_pbar=True, seed=validation.seed
    )
    return vae.decode(samples)[0].float().cpu()


def read_picture(path: Path) -> torch.Tensor:
    """A picture as ComfyUI's Load Image gives it, turned as its file asks: (1, H, W, 3) in 0..1.

    Raises:
        FileNotFoundError, ValueError: it is missing or cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"validation: {path} was not found. Name a picture for each clip as first_frame.")
    try:
        with Image.open(path) as picture:
            pixels = numpy.array(ImageOps.exif_transpose(picture).convert("RGB"))
    except OSError as error:
        raise ValueError(f"validation: {path} is no picture that can be read ({error}). Choose another.") from error
    return torch.from_numpy(pixels).float()[None] / 255
