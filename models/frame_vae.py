"""Image VAEs that take clips: every frame of a 5-D latent is decoded, every frame of a clip encoded."""

import logging

import comfy.sd
import torch

from .pictures import pixels_to_encode

# Groups of the norms that ComfyUI's Load VAE builds.
COMFYUI_GROUPS = 32


class FrameVAE(comfy.sd.VAE):
    """`comfy.sd.VAE` over frames. Frames join the batch, which ComfyUI's own loop splits by free memory.

    Latents (B, C, F, h, w) <-> images (B, F, H, W, 3) in 0..1. 4-D latents are decoded as ComfyUI's VAE does; an image
    batch (F, H, W, 3) is encoded as one clip (1, C, F, h, w).
    """

    def get_sd(self, **options) -> dict[str, torch.Tensor]:
        """The weights, for ComfyUI's Save VAE and Save Checkpoint; what Load VAE cannot tell from them is logged."""
        norms = (module for module in self.first_stage_model.modules() if isinstance(module, torch.nn.GroupNorm))
        groups = {norm.num_groups for norm in norms} - {COMFYUI_GROUPS}
        if groups:
            logging.warning(
                "This VAE has norms of %d groups, which a saved file does not say: Load VAE would take %d and decode "
                "noise. Keep the vae folder of the checkpoint, and load that.",
                groups.pop(),
                COMFYUI_GROUPS,
            )
        return super().get_sd(**options)

    def decode(self, samples_in: torch.Tensor, vae_options: dict = {}, **options) -> torch.Tensor:
        """Decode latents to images.

        Raises:
            ValueError: these are latents of something else.
        """
        self._check(samples_in)
        return _over_frames(lambda frames: super(FrameVAE, self).decode(frames, vae_options, **options), samples_in)

    def decode_tiled(self, samples: torch.Tensor, *spatial, **tiling) -> torch.Tensor:
        """Decode latents tile by tile; frames need no temporal tiles.

        Raises:
            ValueError: these are latents of something else.
        """
        self._check(samples)
        return _over_frames(
            lambda frames: super(FrameVAE, self).decode_tiled(frames, *spatial[:3], **_spatial(tiling)), samples
        )

    def encode(self, pixel_samples: torch.Tensor, **options) -> torch.Tensor:
        """Encode images (F, H, W, C) or (B, F, H, W, C) to latents (B, 4, F, h, w)."""
        return _over_clips(lambda frames: super(FrameVAE, self).encode(frames, **options), pixel_samples)

    def encode_tiled(self, pixel_samples: torch.Tensor, *spatial, **tiling) -> torch.Tensor:
        """Encode images tile by tile to latents (B, 4, F, h, w)."""
        return _over_clips(
            lambda frames: super(FrameVAE, self).encode_tiled(frames, *spatial[:3], **_spatial(tiling)), pixel_samples
        )

    def encode_sample(self, pixel_samples: torch.Tensor, seed: int) -> torch.Tensor:
        """Encode images (N, H, W, C) to a draw from the posterior, (N, 4, h, w), with noise drawn on the CPU.

        Raises:
            ValueError: the autoencoder predicts no distribution.
        """
        autoencoder = self.first_stage_model
        if not hasattr(autoencoder, "quant_conv"):
            raise ValueError(
                f"{type(autoencoder).__name__} encodes to one latent, not to a distribution to draw from. "
                "Choose the mode, or use the VAE of the checkpoint."
            )
        moments_vae = FrameVAE.__new__(FrameVAE)
        moments_vae.__dict__.update(self.__dict__, first_stage_model=_Moments(autoencoder), latent_channels=8)
        mean, log_variance = comfy.sd.VAE.encode(moments_vae, pixel_samples).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(mean)
        return mean + noise * (0.5 * log_variance.clamp(-30.0, 20.0)).exp()

    def _check(self, latents: torch.Tensor) -> None:
        """Raise ValueError unless these are latents of this VAE."""
        shape = tuple(latents.shape)
        if len(shape) not in (4, 5) or shape[1] != self.latent_channels or 0 in shape:
            raise ValueError(
                f"This VAE decodes latents of {self.latent_channels} channels, (batch, channels, height, width) or "
                f"(batch, channels, frames, height, width), found {shape}. Connect the VAE that belongs to the latents."
            )


class _Moments:
    """The encoder half of an autoencoder, without choosing a latent: mean and log variance side by side."""

    def __init__(self, autoencoder: torch.nn.Module):
        self.autoencoder = autoencoder

    def encode(self, pixels: torch.Tensor, **options) -> torch.Tensor:
        return self.autoencoder.quant_conv(self.autoencoder.encoder(pixels))


def _spatial(tiling: dict) -> dict:
    """Return the options of a tiled call without those of tiles in time."""
    return {key: value for key, value in tiling.items() if key not in ("tile_t", "overlap_t")}


def _over_frames(decode, latents: torch.Tensor) -> torch.Tensor:
    if latents.ndim != 5:
        return decode(latents)
    frames = latents.movedim(2, 1).flatten(0, 1)
    return decode(frames).unflatten(0, (latents.shape[0], latents.shape[2]))


def _over_clips(encode, images: torch.Tensor) -> torch.Tensor:
    images = pixels_to_encode(images)
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
            "connect an image VAE."
        )
    frame_vae = FrameVAE.__new__(FrameVAE)
    frame_vae.__dict__.update(vae.__dict__)
    return frame_vae
