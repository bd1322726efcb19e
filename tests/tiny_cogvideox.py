"""A tiny CogVideoX autoencoder in the published layout: same file names, keys and configuration fields."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLCogVideoX

TINY_VAE = {
    "block_out_channels": (16, 32, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "latent_channels": 16,
    "scaling_factor": 0.7,
}
PUBLISHED_VAE = {
    "_class_name": "AutoencoderKLCogVideoX",
    "_diffusers_version": "0.31.0.dev0",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "invert_scale_latents": False,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 3,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 0.7,
    "shift_factor": None,
    "temporal_compression_ratio": 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


def tiny_vae(seed: int = 0, **settings) -> AutoencoderKLCogVideoX:
    """The reference network with seeded weights, none of them zero."""
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(seed)
        vae = AutoencoderKLCogVideoX(**{**TINY_VAE, **settings}).eval().requires_grad_(False)
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return vae


def write_vae(folder: Path, seed: int = 0, config: dict | None = None, **settings) -> None:
    """Write a CogVideoX VAE into `folder`: config.json and diffusion_pytorch_model.safetensors.

    Args:
        config: fields to put into config.json beyond what diffusers writes.
        settings: arguments of the network that differ from `TINY_VAE`.
    """
    tiny_vae(seed, **settings).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text(encoding="utf-8")), **(config or {})}, indent=2), encoding="utf-8"
    )
