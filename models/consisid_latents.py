"""Latents of CogVideoX's video autoencoder."""

import comfy.latent_formats
import torch

from .latent_format import frame_grid

# No colours of the 16 channels are published; their sum in grey shows where things are and how they move.
PREVIEW_WEIGHT = 0.1


class CogVideoXLatentFormat(comfy.latent_formats.CogVideoX):
    """Clips (B, 16, F', h, w), F' = 1 + (F - 1) / 4 and h, w an eighth of the frame; previews show every latent frame.

    Args:
        scale_factor: of the clip's latents for the network; 0.7 as published with ConsisID.
        picture_factor: of the latents of a picture that the clip starts from; None: the same.
    """

    latent_rgb_factors_reshape = staticmethod(frame_grid)

    def __init__(self, scale_factor: float = 0.7, picture_factor: float | None = None):
        super().__init__()
        self.factors = {"scale_factor": scale_factor, "picture_factor": picture_factor}
        self.latent_rgb_factors = [[PREVIEW_WEIGHT] * 3 for _ in range(self.latent_channels)]
        self.scale_factor = scale_factor
        self.picture_factor = scale_factor if picture_factor is None else picture_factor

    def process_picture(self, latent: torch.Tensor) -> torch.Tensor:
        """Scale the latent of a picture that a clip starts from."""
        return latent * self.picture_factor
