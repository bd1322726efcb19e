"""ModelScope text-to-video (VideoFusion) in ComfyUI."""

import math

import comfy.conds
import comfy.model_management

from .base import VideoModel


class ModelScopeModel(VideoModel):
    """`ModelScopeUNet` with the text's keys and values projected once per sampling run."""

    def extra_conds(self, **kwargs) -> dict:
        """Conditioning of one prompt. Prompts with hooks (scheduled LoRAs) change the weights during the run and are projected at every call."""
        conds = super().extra_conds(**kwargs)
        text = kwargs.get("cross_attn")
        if text is not None and kwargs.get("hooks") is None:
            text = comfy.model_management.cast_to_device(text, kwargs["device"], self.get_dtype_inference())
            conds["text_keys_values"] = comfy.conds.CONDCrossAttn(self.diffusion_model.project_text(text))
        return conds
