"""The CogVideoX video VAE as ComfyUI's VAE type."""

import copy
import logging
from collections.abc import Callable

import comfy.ldm.cogvideo.vae
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from .cogvideox_vae_chunks import ChunkedAutoencoder
from .cogvideox_vae_memory import compression_of_space, compression_of_time, memory_functions
from .pictures import pixels_to_encode

DTYPES = (torch.bfloat16, torch.float32)


class CogVideoXVAE(comfy.sd.VAE):
    """`comfy.sd.VAE` over `ChunkedAutoencoder`, for ComfyUI's VAE Decode / Encode nodes, tiled or not.

    Latents (B, c, F', h, w), not scaled for the network, <-> images (B, 4 (F' - 1) + 1, 8 h, 8 w, 3) in 0..1, for the
    published compression. An image batch (F, H, W, 3) is encoded as one clip. Frames after the last 4 k + 1 and pixels
    beside the middle multiple of 8 are left out, which is what ComfyUI does with other video VAEs.
    """

    def __init__(self, config: dict, load: Callable[[torch.dtype], ChunkedAutoencoder]):
        """Build the VAE with the settings that ComfyUI has for CogVideoX.

        Args:
            config: the autoencoder's configuration.
            load: a function of the storage type that returns the adopted network with its weights.
        """
        latent_channels = config["latent_channels"]
        with torch.device("meta"):
            native = comfy.ldm.cogvideo.vae.AutoencoderKLCogVideoX(latent_channels=latent_channels)
            super().__init__(sd=native.state_dict(), dtype=_computation_dtype())
        self.first_stage_model = load(self.vae_dtype)
        comfy.model_management.archive_model_dtypes(self.first_stage_model)
        offload_device = comfy.model_management.vae_offload_device()
        self.patcher = comfy.model_patcher.CoreModelPatcher(self.first_stage_model, self.device, offload_device)
        self.size = comfy.model_management.module_size(self.first_stage_model)
        self._set_compression(config)
        self.memory_used_decode, self.memory_used_encode = memory_functions(config)

    def _set_compression(self, config: dict) -> None:
        time, space = compression_of_time(config), compression_of_space(config)
        self.upscale_ratio = (lambda frames: max(0, time * (frames - 1) + 1), space, space)
        self.downscale_ratio = (lambda frames: max(0, (frames - 1) // time + 1), space, space)
        self.upscale_index_formula = self.downscale_index_formula = (time, space, space)

    def get_sd(self, **options) -> dict[str, torch.Tensor]:
        """The weights, for ComfyUI's Save VAE and Save Checkpoint."""
        logging.warning(
            "A saved CogVideoX VAE is for other programs: ComfyUI's Load VAE divides clips otherwise and decodes "
            "slightly other frames. For ConsisID, keep the vae folder of the checkpoint and use Load ConsisID."
        )
        return super().get_sd(**options)

    def vae_encode_crop_pixels(self, pixels: torch.Tensor, **options) -> torch.Tensor:
        """Crop images (F, H, W, C) or (B, F, H, W, C) to what the encoder takes.

        Raises:
            ValueError: there is no frame.
        """
        pixels = pixels_to_encode(pixels)
        frames = pixels.shape[-4]
        whole = self.upscale_ratio[0](self.downscale_ratio[0](frames))
        if not whole:
            raise ValueError("The clip to encode has no frames. Connect at least one image.")
        if whole != frames:
            logging.info("CogVideoX VAE: encodes the first %d of %d frames.", whole, frames)
        clips = pixels.narrow(-4, 0, whole)
        cropped = super().vae_encode_crop_pixels(clips.reshape(-1, *clips.shape[-3:]), **options)
        return cropped.reshape(*clips.shape[:-3], *cropped.shape[-3:])

    def decode(self, samples_in: torch.Tensor, vae_options: dict = {}, **options) -> torch.Tensor:
        """Decode latents (B, c, F', h, w) to images.

        Raises:
            ValueError: these are latents of something else.
        """
        self._check(samples_in)
        return super().decode(samples_in, vae_options, **options)

    def decode_tiled(
        self,
        samples: torch.Tensor,
        tile_x: int = 32,
        tile_y: int = 32,
        overlap: int = 8,
        tile_t: int | None = None,
        overlap_t: int | None = None,
        **options,
    ) -> torch.Tensor:
        """Decode latents in tiles of `tile_x` by `tile_y` latent pixels that ComfyUI blends over `overlap`.

        `tile_t` and `overlap_t` are accepted and not used: a clip's chunks already bound its memory, without the seams
        and the repeated work of tiles in time.

        Raises:
            ValueError: these are latents of something else.
        """
        self._check(samples)
        tiles = self._reserving_one_tile(tile_x, tile_y)
        return super(CogVideoXVAE, tiles).decode_tiled(
            samples, tile_x, tile_y, overlap, tile_t=max(2, samples.shape[2]), **options
        )

    def encode_tiled(
        self,
        pixel_samples: torch.Tensor,
        tile_x: int = 512,
        tile_y: int = 512,
        overlap: int = 64,
        tile_t: int | None = None,
        overlap_t: int | None = None,
        **options,
    ) -> torch.Tensor:
        """Encode images in tiles of `tile_x` by `tile_y` pixels; see `decode_tiled` for tiles in time."""
        tiles = self._reserving_one_tile(tile_x, tile_y)
        return super(CogVideoXVAE, tiles).encode_tiled(pixel_samples, tile_x, tile_y, overlap, **options)

    def encode_sample(self, pixel_samples: torch.Tensor, seed: int) -> torch.Tensor:
        """Encode images to a draw from the posterior, shaped as by `encode`, with noise drawn on the CPU."""
        moments_vae = copy.copy(self)
        moments_vae.first_stage_model = _Moments(self.first_stage_model)
        # ComfyUI reads it when it has to encode in tiles, after it ran out of memory.
        moments_vae.latent_channels = 2 * self.latent_channels
        mean, log_variance = moments_vae.encode(pixel_samples).chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed)).to(mean)
        return mean + noise * (0.5 * log_variance.clamp(-30.0, 20.0)).exp()

    def _reserving_one_tile(self, height: int, width: int) -> "CogVideoXVAE":
        """This VAE, asking ComfyUI for the memory of one tile instead of the whole picture's."""

        def of_tile(memory_used):
            return lambda shape, dtype: memory_used((*shape[:3], min(shape[3], height), min(shape[4], width)), dtype)

        tiles = copy.copy(self)
        tiles.memory_used_decode = of_tile(self.memory_used_decode)
        tiles.memory_used_encode = of_tile(self.memory_used_encode)
        return tiles

    def _check(self, latents: torch.Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.latent_channels or 0 in latents.shape:
            raise ValueError(
                f"The CogVideoX VAE decodes latents (batch, {self.latent_channels}, frames, height, width), found "
                f"{tuple(latents.shape)}. Connect latents of a CogVideoX-class network, or the VAE that belongs to "
                "these latents."
            )


def _computation_dtype() -> torch.dtype:
    """Type that the autoencoder computes in on ComfyUI's device for VAEs, unless an option names another.

    ComfyUI would choose float16 on devices without bfloat16. The autoencoders of the 5B class were trained in bfloat16
    and are published without a word for float16, whose range their activations may leave, so float32 it is there.
    """
    dtype = comfy.model_management.vae_dtype(comfy.model_management.vae_device(), list(DTYPES))
    if dtype not in DTYPES:
        logging.warning("CogVideoX VAE: computes in float16, as an option of ComfyUI asks; frames may come out black.")
    return dtype


class _Moments:
    """The encoder half of an autoencoder, without choosing a latent: mean and log variance side by side."""

    def __init__(self, autoencoder: ChunkedAutoencoder):
        self.encode = autoencoder.moments
