"""How much memory `ChunkedAutoencoder` needs for a clip, from its configuration.

The peak is the first residual block at full resolution: its input, the normalized input, the output, the frames that a
convolution reads and writes at once, and what the causal convolutions keep for the next chunk.
"""

from collections.abc import Callable

import comfy.model_management
import torch

from .cogvideox_vae_chunks import CONVOLUTION_ELEMENTS, chunk_bounds

REACH = 2
IMAGE_CHANNELS = 3
CHUNK_LATENTS = 2
# Room beside what is counted, for the workspaces of convolutions.
ALLOWANCE = 1.15
# ComfyUI's factor for autoencoders on AMD, whose convolutions want large workspaces (comfy.sd.VAE, VAE_KL_MEM_RATIO).
AMD_FACTOR = 2.73

MemoryFunction = Callable[[tuple, torch.dtype], float]


def memory_functions(config: dict) -> tuple[MemoryFunction, MemoryFunction]:
    """Functions (shape, dtype) -> bytes, of latents (B, c, F', h, w) to decode and of images (B, 3, F, H, W) to encode.

    They hold for one clip of the batch, as ComfyUI wants it, without the weights and with room for workspaces.

    Args:
        config: the autoencoder's configuration.
    """
    widths, layers, space = config["block_out_channels"], config["layers_per_block"], compression_of_space(config)
    time = compression_of_time(config)
    chunk_frames = CHUNK_LATENTS * time
    before, width = (*widths, *widths[-1:])[1], widths[0]

    full, *reduced = _kept(widths[::-1], layers + 1)[::-1]
    decoder_full = full + REACH * width
    decoder_reduced = _at_full_resolution(reduced) + REACH * 4 * widths[-1] / space**2
    encoder_full, *reduced = _kept(widths, layers)
    encoder_reduced = _at_full_resolution(reduced) + REACH * 5 * widths[-1] / space**2

    def decode(shape: tuple, dtype: torch.dtype) -> float:
        frames, pixels = shape[2], shape[3] * shape[4] * space**2
        bounds = chunk_bounds(frames, CHUNK_LATENTS)
        per_pixel = _block((bounds[0][1] - 1) * time + 1, before, width, pixels)
        if len(bounds) > 1:
            later = _block(chunk_frames, before, width, pixels) + decoder_full
            # the last chunk leaves nothing behind: of two, only the first has its reduced levels' frames beside it
            following = later + decoder_reduced if len(bounds) > 2 else later
            per_pixel = max(per_pixel + decoder_reduced, following)
        images = IMAGE_CHANNELS * ((frames - 1) * time + 1)
        return _room() * (per_pixel + images) * pixels * dtype.itemsize

    def encode(shape: tuple, dtype: torch.dtype) -> float:
        frames, pixels = shape[2], shape[3] * shape[4]
        bounds = chunk_bounds(frames, chunk_frames)
        per_pixel = _block(bounds[0][1], width, width, pixels)
        if len(bounds) > 1:
            later = _block(chunk_frames, width, width, pixels) + encoder_reduced
            per_pixel = max(per_pixel, later) + encoder_full
        return _room() * (per_pixel + IMAGE_CHANNELS * frames) * pixels * dtype.itemsize

    return decode, encode


def _room() -> float:
    return ALLOWANCE * (AMD_FACTOR if comfy.model_management.is_amd() else 1)


def compression_of_time(config: dict) -> int:
    """Images that a latent frame after the first stands for: a power of two, as the network rounds it down."""
    return 1 << (int(config["temporal_compression_ratio"]).bit_length() - 1)


def compression_of_space(config: dict) -> int:
    """Pixels along one side of the picture that a latent pixel stands for."""
    return 2 ** (len(config["block_out_channels"]) - 1)


def _block(frames: int, before: int, width: int, pixels: int) -> int:
    """Elements per pixel in a residual block from `before` to `width` channels."""
    step = min(frames, max(1, CONVOLUTION_ELEMENTS // (before * pixels) - REACH))
    return frames * (2 * before + width) + (step + REACH) * before + step * width


def _kept(widths: list[int], resnets: int) -> list[int]:
    """Elements per pixel that the convolutions of each level's residual blocks keep, in the order of execution."""
    return [REACH * (before + (2 * resnets - 1) * width) for before, width in zip((widths[0], *widths[:-1]), widths)]


def _at_full_resolution(levels: list[int]) -> float:
    """Sum over the levels after the one of full resolution, per pixel of that one."""
    return sum(level / 4**halvings for halvings, level in enumerate(levels, start=1))
