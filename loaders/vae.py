"""Image VAEs that take clips: every frame of a 5-D latent is decoded, every frame of a clip encoded."""

from pathlib import Path

import comfy.diffusers_convert
import comfy.ldm.models.autoencoder
import comfy.sd
import torch

from .folders import read_config
from .network import compare
from .weights import find_weights, read_weights

PUBLISHED_SCALING_FACTOR = 0.18215
LEVELS = 4
LATENT_CHANNELS = 4


class FrameVAE(comfy.sd.VAE):
    """`comfy.sd.VAE` over frames. Frames join the batch, which ComfyUI's own loop splits by free memory.

    Latents (B, C, F, h, w) <-> images (B, F, H, W, 3) in 0..1; 4-D latents and image batches are treated as ComfyUI's
    VAE treats them,
    except that an encoded image batch (F, H, W, 3) is one clip (1, C, F, h, w).
    """

    def decode(self, samples_in: torch.Tensor, vae_options: dict = {}) -> torch.Tensor:
        """Decode latents to images."""
        return _over_frames(lambda frames: super(FrameVAE, self).decode(frames, vae_options), samples_in)

    def decode_tiled(self, samples: torch.Tensor, **tiling) -> torch.Tensor:
        """Decode latents tile by tile; frames need no temporal tiles."""
        return _over_frames(lambda frames: super(FrameVAE, self).decode_tiled(frames, **_spatial(tiling)), samples)

    def encode(self, pixel_samples: torch.Tensor) -> torch.Tensor:
        """Encode images (F, H, W, C) or (B, F, H, W, C) to latents (B, 4, F, h, w)."""
        return _over_clips(super().encode, pixel_samples)

    def encode_tiled(self, pixel_samples: torch.Tensor, **tiling) -> torch.Tensor:
        """Encode images tile by tile to latents (B, 4, F, h, w)."""
        return _over_clips(lambda frames: super(FrameVAE, self).encode_tiled(frames, **_spatial(tiling)), pixel_samples)


def _spatial(tiling: dict) -> dict:
    return {key: value for key, value in tiling.items() if key not in ("tile_t", "overlap_t")}


def _over_frames(decode, latents: torch.Tensor) -> torch.Tensor:
    if latents.ndim != 5:
        return decode(latents)
    frames = latents.movedim(2, 1).flatten(0, 1)
    return decode(frames).unflatten(0, (latents.shape[0], latents.shape[2]))


def _over_clips(encode, images: torch.Tensor) -> torch.Tensor:
    clips, frames = images.shape[:2] if images.ndim == 5 else (1, images.shape[0])
    latents = encode(images.flatten(0, 1) if images.ndim == 5 else images)
    return latents.unflatten(0, (clips, frames)).movedim(1, 2)


def over_frames(vae: comfy.sd.VAE) -> FrameVAE:
    """The same image VAE (weights and patcher are shared) as one that takes clips.

    Raises:
        ValueError: the VAE is no image VAE.
    """
    if vae.latent_dim != 2:
        raise ValueError(
            f"This VAE has {vae.latent_dim}-D latents of its own and handles clips already. Connect it directly, or "
            f"connect an image VAE."
        )
    frame_vae = FrameVAE.__new__(FrameVAE)
    frame_vae.__dict__.update(vae.__dict__)
    return frame_vae


def load_vae(folder: Path, prefer_half: bool = False) -> FrameVAE:
    """Load `<folder>/vae`, a diffusers AutoencoderKL of any size.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit the configuration.
    """
    config_file = folder / "vae" / "config.json"
    settings = {"embed_dim": 4, "ddconfig": _autoencoder_settings(read_config(config_file), config_file)}
    files = find_weights(folder / "vae", "diffusion_pytorch_model", prefer_half)
    state = comfy.diffusers_convert.convert_vae_state_dict(read_weights(files))
    with torch.device("meta"):
        difference = compare(state, comfy.ldm.models.autoencoder.AutoencoderKL(**settings))
    if difference:
        raise ValueError(
            f"{', '.join(map(str, files))} does not fit {config_file}: {difference.summary()}. Restore the "
            f"published files."
        )
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
            f"checkpoint."
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
