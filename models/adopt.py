"""Make a network of another library a citizen of ComfyUI's memory management.

`comfy.ops` layers subclass torch's and add attributes only, so a built network is adopted by changing the class of its
layers: weights then stream from RAM in low-VRAM mode, are cast to the compute type on the fly, and take LoRA patches.
"""

import inspect

import comfy.model_patcher
import comfy.utils
import torch

from .convolution import FewPixelConvolution

ADOPTED_LAYERS = ("Linear", "Conv1d", "Conv2d", "Conv3d", "GroupNorm", "LayerNorm", "RMSNorm", "Embedding")

# Larger ones, such as a table of positions, are read once per run and stay where ComfyUI leaves them.
SMALL_BYTES = 2**16


def adopt(network: torch.nn.Module, operations: type, replacements: dict[type, type] | None = None) -> torch.nn.Module:
    """Change the classes of a network's modules in place and return it.

    Args:
        network: the built network; exact torch layer types become `operations.<same name>`.
        operations: a `comfy.ops` namespace such as `comfy.ops.manual_cast`.
        replacements: module class -> its subclass (same attributes, another `forward`).
    """
    classes = {getattr(torch.nn, name): getattr(operations, name) for name in ADOPTED_LAYERS}
    classes[torch.nn.Conv2d] = type("Conv2d", (FewPixelConvolution, operations.Conv2d), {})
    settings = {adopted: list(inspect.signature(layer).parameters) for layer, adopted in classes.items()}
    classes.update(replacements or {})
    for module in network.modules():
        adopted = classes.get(type(module))
        if adopted is not None:
            module.__class__ = adopted
            if adopted in settings:
                _complete(module, settings[adopted])
    return network


def _complete(layer: torch.nn.Module, settings: list[str]) -> None:
    """Give an adopted layer the attributes that its new class sets when it builds one; `settings` are its arguments.

    Norms and embeddings of ComfyUI look for a bias that torch's do not have, and `--fast cublas_ops` adds its own.
    """
    given = {name: value for name, value in vars(layer).items() if name in settings}
    if "bias" in settings:
        given["bias"] = layer.bias is not None
    dtype = None if layer.weight is None else layer.weight.dtype
    built = type(layer)(**given, device="meta", dtype=dtype)
    held = vars(layer) | layer._parameters | layer._buffers
    vars(layer).update({name: value for name, value in vars(built).items() if name not in held})


def is_bypassed(layer: torch.nn.Module) -> bool:
    """Whether a layer is called in a way of its own, which adapters do that bypass its weights.

    Where they were taken off, the layer keeps its class's `forward` as an attribute.
    """
    own = vars(layer).get("forward")
    return own is not None and getattr(own, "__func__", own) is not type(layer).forward


def bring_small_tensors(patcher: comfy.model_patcher.ModelPatcher, device: torch.device, *args, **kwargs) -> None:
    """Callback for after a model was loaded (`ON_LOAD`): move small parameters and buffers outside of layers as well.

    ComfyUI loads layers. In low-VRAM mode it leaves the rest where it is, such as the table of noise levels, and every
    step would wait for its transfer.
    """
    for module in patcher.model.modules():
        if hasattr(module, "comfy_cast_weights"):
            continue
        for place, tensors in (
            (comfy.utils.set_attr_param, dict(module.named_parameters(recurse=False))),
            (comfy.utils.set_attr_buffer, dict(module.named_buffers(recurse=False))),
        ):
            for name, tensor in tensors.items():
                if tensor.nbytes <= SMALL_BYTES and tensor.device != device:
                    place(module, name, tensor.to(device))
