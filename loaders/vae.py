"""Image VAEs of diffusers folders."""

import math
from pathlib import Path

import comfy.diffusers_convert
import comfy.ldm.models.autoencoder
import torch

from ..models.frame_vae import COMFYUI_GROUPS, FrameVAE
from ..models.latent_format import FrameLatentFormat
from .config_fields import IMAGE_VAE
from .folders import read_config
from .network import plain_network, require_fit, static_patcher
from .weights import find_weights, read_weights

PUBLISHED_SCALING_FACTOR = 0.18215
LEVELS = 4
LATENT_CHANNELS = 4


def load_vae(folder: Path, prefer_half: bool = False) -> FrameVAE:
    """Load `<folder>/vae`, a diffusers AutoencoderKL of any size.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit the configuration.
    """
    config_file = folder / "vae" / "config.json"
    config = read_config(config_file)
    IMAGE_VAE.check(config, config_file)
    settings = {"embed_dim": 4, "ddconfig": _autoencoder_settings(config, config_file)}
    files = find_weights(folder / "vae", "diffusion_pytorch_model", prefer_half)
    state = comfy.diffusers_convert.convert_vae_state_dict(read_weights(files))
    state |= _absent_layers(config)
    # Convolutions only: with dynamic VRAM, too, these layers have weights from the start.
    network = plain_network(lambda _: comfy.ldm.models.autoencoder.AutoencoderKL(**settings))
    require_fit(state, network, files, config_file)
    vae = FrameVAE(sd=state, config={"params": settings})
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = config.get("norm_num_groups", COMFYUI_GROUPS)
    return vae


def load_vae_patcher(folder: Path, prefer_half: bool = False, disable_dynamic: bool = False):
    """Load the VAE again for ComfyUI's own use (other devices, other memory modes); returns its patcher."""
    vae = load_vae(folder, prefer_half)
    if not disable_dynamic:
        return vae.patcher
    # A streaming patcher casts weights of the file's type when it loads them.
    vae.first_stage_model.to(vae.vae_dtype)
    return static_patcher(vae.patcher)


def _autoencoder_settings(config: dict, path: Path) -> dict:
    """ComfyUI's settings of the autoencoder that a diffusers configuration describes."""
    channels = config.get("block_out_channels", (128, 256, 512, 512))
    latent_channels = config.get("latent_channels", 4)
    groups = config.get("norm_num_groups", COMFYUI_GROUPS)
    if any(width % COMFYUI_GROUPS or width % groups for width in channels):
        raise ValueError(
            f"{path} has block_out_channels {list(channels)} and norm_num_groups {groups}; expected multiples of "
            f"{math.lcm(COMFYUI_GROUPS, groups)}. Use the VAE published with the checkpoint."
        )
    if len(channels) != LEVELS or latent_channels != LATENT_CHANNELS or any(width % channels[0] for width in channels):
        raise ValueError(
            f"{path} describes an autoencoder with block_out_channels {list(channels)} and {latent_channels} latent "
            f"channels; expected {LEVELS} levels, "
            f"each a multiple of the first, and {LATENT_CHANNELS} latent channels. Use the VAE published with the "
            "checkpoint."
        )
    return {
        "double_z": True,
        "z_channels": latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": channels[0],
        "ch_mult": [width // channels[0] for width in channels],
        "num_res_blocks": config.get("layers_per_block", 2),
        "attn_resolutions": [],
        "dropout": 0.0,
    }


def _absent_layers(config: dict) -> dict[str, torch.Tensor]:
    """Weights that change nothing, of layers that ComfyUI's autoencoder has and this configuration leaves out."""
    latents, state = config.get("latent_channels", LATENT_CHANNELS), {}
    for name, channels in (("quant_conv", 2 * latents), ("post_quant_conv", latents)):
        if not config.get(f"use_{name}", True):
            state[f"{name}.weight"] = torch.eye(channels)[:, :, None, None]
            state[f"{name}.bias"] = torch.zeros(channels)
    if not config.get("mid_block_add_attention", True):
        width = config["block_out_channels"][-1]
        for part in ("encoder", "decoder"):
            attention = f"{part}.mid.attn_1"
            state |= {f"{attention}.norm.weight": torch.ones(width), f"{attention}.norm.bias": torch.zeros(width)}
            for name in ("q", "k", "v", "proj_out"):
                state[f"{attention}.{name}.weight"] = torch.zeros(width, width, 1, 1)
                state[f"{attention}.{name}.bias"] = torch.zeros(width)
    return state


def scaling_factor(folder: Path) -> float:
    """Scale of this VAE's latents for the network."""
    return read_config(folder / "vae" / "config.json").get("scaling_factor", PUBLISHED_SCALING_FACTOR)


def frame_latent_format(folder: Path | None) -> FrameLatentFormat:
    """The latent space of the VAE of `folder`, or the published one if that is None."""
    return FrameLatentFormat() if folder is None else FrameLatentFormat(scaling_factor(folder))
