"""Diffusers checkpoint folders -> MODEL, CLIP, VAE, CLIP_VISION."""

from pathlib import Path

import comfy.clip_vision
import comfy.model_patcher
import comfy.sd

from .assembly import load_folder_network
from .families import T5, Family
from .folders import read_config
from .network import WEIGHT_DTYPES
from .vision import load_vision_patcher, load_vision_tower
from .weights import HALF_TYPES

# Tokens of a prompt where a configuration does not say.
TEXT_TOKENS = 226


def load_folder(
    family: Family, folder: Path, weight_dtype: str
) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
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
    return model, load_folder_clip(family, folder, half), load_folder_vae(family, folder, half)


def load_folder_clip(family: Family, folder: Path, prefer_half: bool = False) -> comfy.sd.CLIP:
    """Load the text encoder of a folder; `prefer_half` takes the `.fp16` variant when both precisions are present.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit its configuration.
    """
    layer_or_tokens = family.text_layer
    if family.text_encoder == T5:
        config = read_config(folder / family.component / "config.json")
        layer_or_tokens = config.get("max_text_seq_length", TEXT_TOKENS)
    clip = family.parts.load_text_encoder(folder, layer_or_tokens, prefer_half)
    clip.patcher.cached_patcher_init = (family.parts.load_text_encoder_patcher, (folder, layer_or_tokens, prefer_half))
    return clip


def load_folder_vae(family: Family, folder: Path, prefer_half: bool = False) -> comfy.sd.VAE:
    """Load the VAE of a folder; `prefer_half` as of `load_folder_clip`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit its configuration.
    """
    vae = family.parts.load_vae(folder, prefer_half)
    vae.patcher.cached_patcher_init = (family.parts.load_vae_patcher, (folder, prefer_half))
    return vae


def load_folder_vision(folder: Path, weight_dtype: str) -> comfy.clip_vision.ClipVisionModel:
    """Load the vision tower of a folder (`image_encoder`).

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit its configuration.
    """
    half = WEIGHT_DTYPES[weight_dtype] in HALF_TYPES
    vision = load_vision_tower(folder, half)
    vision.patcher.cached_patcher_init = (load_vision_patcher, (folder, half))
    return vision
