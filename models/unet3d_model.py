"""What ComfyUI has to know about every 3-D UNet of this pack."""

import math

import comfy.model_management

from .base import VideoModel

# Activations alive at the peak of one call, in elements, measured at the published width of 320 channels (tests measure
# them again). All of it grows with the latent until the feed-forward layers reach their chunk size, then only the first
# part does.
ELEMENTS_PER_POSITION = 4700
CHUNKED_ELEMENTS_PER_POSITION = 5500
CHUNKED_ELEMENTS = 372_000_000
MEASURED_CHANNELS = 320


class UNet3DModel(VideoModel):
    """A `VideoModel` over a 3-D UNet."""

    def memory_required(self, input_shape, cond_shapes={}, **options) -> float:
        """Bytes of activations for latents of `input_shape` (B, C, F, h, w)."""
        positions = input_shape[0] * math.prod(input_shape[2:])
        elements = ELEMENTS_PER_POSITION * positions + min(CHUNKED_ELEMENTS_PER_POSITION * positions, CHUNKED_ELEMENTS)
        width = self.model_config.unet_config["model_channels"] / MEASURED_CHANNELS
        return elements * width * comfy.model_management.dtype_size(self.get_dtype_inference())
