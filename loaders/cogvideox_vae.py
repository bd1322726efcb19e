"""CogVideoX VAEs of diffusers folders."""

from pathlib import Path

import comfy.ops

from ..models.cogvideox_vae import CogVideoXVAE
from ..models.cogvideox_vae_chunks import ChunkedAutoencoder, replacements
from ..models.consisid_latents import CogVideoXLatentFormat
from .folders import read_config
from .network import build_on_meta, load_network, static_patcher
from .weights import find_weights, read_weights

PUBLISHED_CLASS = "AutoencoderKLCogVideoX"
OPERATIONS = comfy.ops.disable_weight_init


def load_cogvideox_vae(folder: Path, prefer_half: bool = False) -> CogVideoXVAE:
    """Load `<folder>/vae`, a diffusers AutoencoderKLCogVideoX of any size.

    Args:
        folder: the checkpoint's folder.
        prefer_half: take the `.fp16` variant when both precisions are present.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, of another class, or does not fit the configuration.
    """
    config_file = folder / "vae" / "config.json"
    config = read_config(config_file)
    if config.get("_class_name") != PUBLISHED_CLASS:
        raise ValueError(
            f"{config_file} describes a {config.get('_class_name') or 'network without _class_name'}, expected "
            f"{PUBLISHED_CLASS}. Download the vae folder that the checkpoint was published with."
        )
    network = build_on_meta(ChunkedAutoencoder, config, str(config_file))
    files = find_weights(folder / "vae", "diffusion_pytorch_model", prefer_half)
    state, source = read_weights(files), ", ".join(map(str, files))
    return CogVideoXVAE(
        dict(network.config),
        lambda dtype: load_network(network, state, dtype, OPERATIONS, replacements(OPERATIONS), source),
    )


def load_cogvideox_vae_patcher(folder: Path, prefer_half: bool = False, disable_dynamic: bool = False):
    """Load the VAE again for ComfyUI's own use (other devices, other memory modes); returns its patcher."""
    patcher = load_cogvideox_vae(folder, prefer_half).patcher
    return static_patcher(patcher) if disable_dynamic else patcher


def latent_scales(folder: Path) -> tuple[float, float]:
    """Factors on the VAE's latents of `folder`: of the clip for the network, and of the picture it is conditioned on.

    Both are `scaling_factor`, except that the picture's is its inverse with `invert_scale_latents` (CogVideoX 1.5
    image-to-video), as in diffusers' CogVideoXImageToVideoPipeline.prepare_latents.
    """
    config = read_config(folder / "vae" / "config.json")
    scale = config.get("scaling_factor", 1.15258426)
    return scale, 1 / scale if config.get("invert_scale_latents") else scale


def clip_latent_format(folder: Path | None) -> CogVideoXLatentFormat:
    """The latent space of the VAE of `folder`, or the published one if that is None."""
    return CogVideoXLatentFormat() if folder is None else CogVideoXLatentFormat(*latent_scales(folder))
