"""CLIP vision towers of diffusers folders as ComfyUI's CLIP_VISION, built from the folder's own configuration."""

from pathlib import Path

import comfy.clip_model
import comfy.clip_vision
import torch

from .config_fields import ACTIVATIONS, CLIP_PICTURES, CLIP_VISION
from .folders import read_config, read_config_or
from .network import plain_network, require_fit, static_patcher
from .text_encoder import set_norm_eps
from .weights import find_weights, read_weights, transformers_stem

# Of OpenCLIP ViT-H/14, and of transformers' CLIPVisionConfig where a published file is silent.
DEFAULTS = {
    "hidden_act": "quick_gelu",
    "model_type": "clip_vision_model",
    "num_channels": 3,
    "projection_dim": 512,
}
REQUIRED = ("hidden_size", "image_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size")


def load_vision_tower(folder: Path, prefer_half: bool = False) -> comfy.clip_vision.ClipVisionModel:
    """Load `<folder>/image_encoder`, a CLIP vision tower with projection, normalising as `feature_extractor` says.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit the configuration.
    """
    config_file = folder / "image_encoder" / "config.json"
    config = {**DEFAULTS, **read_config(config_file)}
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise ValueError(
            f"{config_file} lacks {', '.join(missing)}. Expected the configuration of a CLIP vision model with "
            "projection; restore the published file."
        )
    CLIP_VISION.check(config, config_file)
    config["hidden_act"] = ACTIVATIONS[config["hidden_act"]]
    statistics_file = folder / "feature_extractor" / "preprocessor_config.json"
    statistics = read_config_or(statistics_file, {})
    # None: the size is the tower's own
    sizes = {key: statistics[key] for key in ("size", "crop_size") if key in statistics}
    sizes = {key: None if _side(value) == config["image_size"] else value for key, value in sizes.items()}
    CLIP_PICTURES.check(statistics | sizes, statistics_file)
    config |= {key: statistics[key] for key in ("image_mean", "image_std") if key in statistics}
    files = find_weights(folder / "image_encoder", transformers_stem(folder / "image_encoder"), prefer_half)
    state = {key: value for key, value in read_weights(files).items() if not key.endswith("position_ids")}
    require_fit(state, vision_tower_on_meta(config), files, config_file)
    vision = comfy.clip_vision.ClipVisionModel(config)
    set_norm_eps(vision.model, config)
    vision.load_sd(state)
    return vision


def _side(size: object) -> int | None:
    """Pixels of the shorter side that a `size` or `crop_size` means, None for what is not one."""
    sides = list(size.values()) if isinstance(size, dict) else [size]
    return min(sides) if sides and all(isinstance(side, int) for side in sides) else None


def vision_tower_on_meta(config: dict) -> torch.nn.Module:
    """ComfyUI's CLIP vision tower of plain layers, without memory for its weights."""
    return plain_network(lambda layers: comfy.clip_model.CLIPVisionModelProjection(config, torch.float32, None, layers))


def load_vision_patcher(folder: Path, prefer_half: bool = False, disable_dynamic: bool = False):
    """Load the vision tower again for ComfyUI's own use (other devices, other memory modes); returns its patcher."""
    patcher = load_vision_tower(folder, prefer_half).patcher
    return static_patcher(patcher) if disable_dynamic else patcher
