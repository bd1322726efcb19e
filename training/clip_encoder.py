"""Frames and captions of samples as the networks see them, by the VAE and the text encoder of a checkpoint folder."""

from pathlib import Path

import comfy.model_management
import torch

from ..loaders.checkpoint import load_folder_clip, load_folder_vae
from ..loaders.families import Family
from ..loaders.vae import scaling_factor
from ..models.latent_format import FrameLatentFormat
from .clips import Sample
from .randomness import seed_of


class ClipEncoder:
    """The frozen half of a checkpoint, in ComfyUI's memory management.

    Args:
        family: of the folder.
        folder: holds the VAE and the text encoder.
        seed: of the run.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, or does not fit its configuration.
    """

    def __init__(self, family: Family, folder: Path, seed: int):
        self.clip, self.vae = load_folder_clip(family, folder), load_folder_vae(family, folder)
        self.latent_format = FrameLatentFormat(scaling_factor(folder))
        self.seed, self.device = seed, comfy.model_management.get_torch_device()

    @torch.no_grad()
    def latents(self, sample: Sample) -> torch.Tensor:
        """The frames as scaled latents (1, 4, F, h, w), drawn from the posterior."""
        drawn = self.vae.encode_sample(sample.frames, seed_of(self.seed, sample.number, "posterior"))
        return self.latent_format.process_in(drawn).transpose(0, 1).unsqueeze(0).to(self.device, torch.float32)

    @torch.no_grad()
    def text(self, caption: str) -> torch.Tensor:
        """States (1, 77, D) of a caption as it stands: brackets weigh nothing, what is too long is cut off."""
        tokens = self.clip.tokenize(caption, disable_weights=True)
        states, _ = self.clip.encode_from_tokens({name: rows[:1] for name, rows in tokens.items()}, return_pooled=True)
        return states.to(self.device, torch.float32)
