"""An image autoencoder that has learnt a few pictures: what it encodes can be recognised when it is decoded."""

import torch
from diffusers import AutoencoderKL

# Of the latents that the decoder learns from, whose own deviation is about 1: it has to bear what a network gets wrong.
NOISE = 0.1
# Of every latent: a draw from the posterior is as good as its mean.
LOG_VARIANCE = -10.0


def learn_vae(pictures: torch.Tensor, steps: int = 200, seed: int = 0) -> AutoencoderKL:
    """Train a Stable Diffusion autoencoder of few channels on pictures (N, H, W, 3) in 0..1, half of them at a time.

    Its `scaling_factor` gives the latents of these pictures unit variance.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    pixels = pictures.movedim(-1, 1) * 2 - 1
    optimizer = torch.optim.AdamW(vae.parameters(), weight_decay=0, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, cycle_momentum=False)
    for _ in range(steps):
        chosen = pixels[torch.randperm(len(pixels))[: len(pixels) // 2]]
        latents = vae.encode(chosen).latent_dist.mean
        decoded = vae.decode(latents + NOISE * torch.randn_like(latents)).sample
        scale = latents.square().mean()
        loss = (decoded - chosen).square().mean() + 0.01 * (scale - 1).square()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        channels = vae.config.latent_channels
        vae.quant_conv.weight[channels:] = 0
        vae.quant_conv.bias[channels:] = LOG_VARIANCE
        vae.register_to_config(scaling_factor=1 / vae.encode(pixels).latent_dist.mean.std().item())
    return vae
