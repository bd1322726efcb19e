"""ModelScope text-to-video (VideoFusion) in ComfyUI."""

import comfy.conds

from .served import Served
from .unet3d_model import UNet3DModel


class ModelScopeModel(UNet3DModel):
    """`ModelScopeUNet` with the text's keys and values projected once per sampling run."""

    served = Served("ModelScope text-to-video")

    def extra_conds(self, **kwargs) -> dict:
        """Conditioning of one prompt.

        Hooks (scheduled LoRAs) change the weights during a run: prompts that carry some are projected at every call.
        """
        conds = super().extra_conds(**kwargs)
        text = self.text_states(**kwargs)
        if kwargs.get("hooks") is None:
            conds["text_keys_values"] = comfy.conds.CONDCrossAttn(self.diffusion_model.project_text(text))
        return conds
