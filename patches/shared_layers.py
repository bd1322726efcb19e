"""The layers of ComfyUI's UNet that consistent self-attention works on."""

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from .token_sharing import Layer


def shared_layers(model: comfy.model_patcher.ModelPatcher) -> dict[Layer, torch.nn.Module]:
    """The transformer blocks whose self-attention can be shared, in the order of execution.

    Raises:
        ValueError: a model that is no UNet with self-attention.
    """
    network = model.model.diffusion_model
    layers = {}
    for number, block in enumerate(network.output_blocks if isinstance(network, UNetModel) else ()):
        for module in block:
            if isinstance(module, SpatialTransformer):
                for index, transformer_block in enumerate(module.transformer_blocks):
                    layers[Layer("output", number, index)] = transformer_block
    if not layers:
        raise ValueError(
            f"Consistent self-attention works with Stable Diffusion 1.x, 2.x and XL; {type(model.model).__name__} has "
            "no UNet with self-attention. Load one of those checkpoints."
        )
    return layers
