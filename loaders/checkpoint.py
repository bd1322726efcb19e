"""Diffusers checkpoint folders -> MODEL, CLIP, VAE, CLIP_VISION."""

from pathlib import Path

import comfy.clip_vision
import comfy.model_patcher
import comfy.sd

from ..models.frame_vae import FrameVAE
from .assembly import load_folder_network
from .families import Family
from .network import WEIGHT_DTYPES
from .text_encoder import load_text_encoder, load_text_encoder_patcher
from .vae import load_vae, load_vae_patcher
from .vision import load_vision_patcher, load_vision_tower
from .weights import HALF_TYPES


def load_folder(
    family: Family, folder: Path, weight_dtype: str
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, FrameVAE]:
    """Load the network, the text encoder and the VAE of a folder.

    Args:
        family: what the folder has to be.
        folder: holds the network's folder, vae, text_encoder, tokenizer, scheduler.
        weight_dtype: storage type of the network's weights, a key of `WEIGHT_DTYPES`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, of another family, or does not fit its configuration.
    """
    half = WEIGHT_DTYPES[weight_dtype] in HALF_TYPES
    model = load_folder_network(family, folder, weight_dtype)
    clip = load_text_encoder(folder, family.text_layer, half)
    clip.patcher.cached_patcher_init = (load_text_encoder_patcher, (folder, family.text_layer, half))
    vae = load_vae(folder, half)
    vae.patcher.cached_patcher_init = (load_vae_patcher, (folder, half))
    return model, clip, vae


def load_folder_vision(folder: Path, weight_dtype: str) -> comfy.clip_vision.ClipVisionModel:
    """Load the vision tower of a folder (`image_encoder`).

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit its configuration.
    """
    half = WEIGHT_DTYPES[weight_dtype] in HALF_TYPES
    vision = load_vision_tower(folder, half)
    vision.patcher.cached_patcher_init = (load_vision_patcher, (folder, half))
    return vision
