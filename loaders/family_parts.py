"""The code of a model family: its classes and how its checkpoint folders are read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.latent_formats
import torch


@dataclass(frozen=True)
class Parts:
    """What a family's modules hold.

    Args:
        network: our class of the network; built from config.json.
        model: how ComfyUI calls it.
        replacements: diffusers class of a module -> ours.
        load_text_encoder, load_text_encoder_patcher: CLIP, and its patcher alone, of a folder.
        load_vae, load_vae_patcher: VAE, and its patcher alone, of a folder.
        latent_format: the latent space as a folder scales it, or as published if there is none (None).
        prepare: takes published keys that the network has no place for out of a state dict.
        read_fields: takes fields that mean something else to the network than to its publishers out of config.json.
        describe: configuration of the network with these weights; None: that of a UNet.
    """

    network: type
    model: type
    replacements: dict[type, type]
    load_text_encoder: Callable
    load_text_encoder_patcher: Callable
    load_vae: Callable
    load_vae_patcher: Callable
    latent_format: Callable[[Path | None], comfy.latent_formats.LatentFormat]
    prepare: Callable[[dict], dict] = dict
    read_fields: Callable[[dict], dict] = dict
    describe: Callable[[Mapping[str, torch.Tensor]], dict] | None = None
