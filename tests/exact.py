"""Networks in float64: whether two implementations agree is then no question of a processor's kernels."""

import comfy.model_patcher
import torch


def in_float64(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """Let the network of a MODEL compute in float64, in place; ComfyUI keeps the state between steps in float32."""
    model.model.diffusion_model.double()
    model.model.model_config.unet_config["dtype"] = torch.float64
    model.model.manual_cast_dtype = None
    return model
