"""Latents of clips whose frames are encoded one by one with a Stable Diffusion image VAE."""

import math

import comfy.latent_formats
import torch


def frame_grid(clips: torch.Tensor) -> torch.Tensor:
    """Lay the frames of the first clip out in rows: (B, C, F, h, w) -> (1, C, rows * h, columns * w), near square."""
    _, channels, frames, height, width = clips.shape
    columns = math.ceil(math.sqrt(frames))
    rows = math.ceil(frames / columns)
    grid = clips.new_zeros(channels, rows * columns, height, width)
    grid[:, :frames] = clips[0]
    return (
        grid.unflatten(1, (rows, columns)).permute(0, 1, 3, 2, 4).reshape(1, channels, rows * height, columns * width)
    )


class FrameLatentFormat(comfy.latent_formats.LatentFormat):
    """Clips (B, 4, F, h, w) in the latent space of Stable Diffusion 1.x; previews show every frame."""

    latent_dimensions = 3
    latent_rgb_factors_reshape = staticmethod(frame_grid)

    def __init__(self, scale_factor: float = 0.18215):
        self.factors = {"scale_factor": scale_factor}
        self.scale_factor = scale_factor
        self.latent_rgb_factors = comfy.latent_formats.SD15().latent_rgb_factors
