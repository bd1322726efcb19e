"""ModelScope text-to-video (VideoFusion) in ComfyUI."""

import math

import comfy.conds
import comfy.model_management

from .base import VideoModel

# Activations alive at the peak of one call, in elements, measured at the published width of 320 channels (tests
# measure them again):
# all of it grows with the latent until the feed-forward layers reach their chunk size, then only the first part does.
ELEMENTS_PER_POSITION = 6500
CHUNKED_ELEMENTS_PER_POSITION = 3400
CHUNKED_ELEMENTS = 113_000_000
MEASURED_CHANNELS = 320


class ModelScopeModel(VideoModel):
    """`ModelScopeUNet` with the text's keys and values projected once per sampling run."""

    def extra_conds(self, **kwargs) -> dict:
        """Conditioning of one prompt.

        Hooks (scheduled LoRAs) change the weights during a run: prompts that carry some are projected at every call.
        """
        conds = super().extra_conds(**kwargs)
        text = kwargs.get("cross_attn")
        if text is not None and kwargs.get("hooks") is None:
            text = comfy.model_management.cast_to_device(text, kwargs["device"], self.get_dtype_inference())
            conds["text_keys_values"] = comfy.conds.CONDCrossAttn(self.diffusion_model.project_text(text))
        return conds

    def memory_required(self, input_shape, cond_shapes={}) -> float:
        """Bytes of activations for latents of `input_shape` (B, C, F, h, w)."""
        positions = input_shape[0] * math.prod(input_shape[2:])
        elements = ELEMENTS_PER_POSITION * positions + min(CHUNKED_ELEMENTS_PER_POSITION * positions, CHUNKED_ELEMENTS)
        width = self.model_config.unet_config["model_channels"] / MEASURED_CHANNELS
        return elements * width * comfy.model_management.dtype_size(self.get_dtype_inference())
