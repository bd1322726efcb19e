"""Image VAEs of diffusers folders."""

from pathlib import Path

import comfy.diffusers_convert
import comfy.ldm.models.autoencoder

from ..models.frame_vae import FrameVAE
from ..models.latent_format import FrameLatentFormat
from .folders import read_config
from .network import plain_network, require_fit
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
    settings = {"embed_dim": 4, "ddconfig": _autoencoder_settings(read_config(config_file), config_file)}
    files = find_weights(folder / "vae", "diffusion_pytorch_model", prefer_half)
    state = comfy.diffusers_convert.convert_vae_state_dict(read_weights(files))
    # Convolutions only: with dynamic VRAM, too, these layers have weights from the start.
    network = plain_network(lambda _: comfy.ldm.models.autoencoder.AutoencoderKL(**settings))
    require_fit(state, network, files, config_file)
    return FrameVAE(sd=state, config={"params": settings})


def load_vae_patcher(folder: Path, prefer_half: bool = False, disable_dynamic: bool = False):
    """Load the VAE again for ComfyUI's own use (other devices); returns its patcher."""
    return load_vae(folder, prefer_half).patcher


def _autoencoder_settings(config: dict, path: Path) -> dict:
    """ComfyUI's settings of the autoencoder that a diffusers configuration describes."""
    channels = config.get("block_out_channels", (128, 256, 512, 512))
    latent_channels = config.get("latent_channels", 4)
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


def scaling_factor(folder: Path) -> float:
    """Scale of this VAE's latents for the network."""
    return read_config(folder / "vae" / "config.json").get("scaling_factor", PUBLISHED_SCALING_FACTOR)


def frame_latent_format(folder: Path | None) -> FrameLatentFormat:
    """The latent space of the VAE of `folder`, or the published one if that is None."""
    return FrameLatentFormat() if folder is None else FrameLatentFormat(scaling_factor(folder))
