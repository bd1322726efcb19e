"""Latents of CogVideoX's video autoencoder."""

import comfy.latent_formats
import torch


class CogVideoXLatentFormat(comfy.latent_formats.CogVideoX):
    """Clips (B, 16, F', h, w), F' = 1 + (F - 1) / 4 and h, w an eighth of the frame.

    Args:
        scale_factor: of the clip's latents for the network; 0.7 as published with ConsisID.
        picture_factor: of the latents of a picture that the clip starts from; None: the same.
    """

    def __init__(self, scale_factor: float = 0.7, picture_factor: float | None = None):
        super().__init__()
        self.scale_factor = scale_factor
        self.picture_factor = scale_factor if picture_factor is None else picture_factor

    def process_picture(self, latent: torch.Tensor) -> torch.Tensor:
        """Scale the latent of a picture that a clip starts from."""
        return latent * self.picture_factor
