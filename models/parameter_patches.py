"""Weight patches: those on parameters that are not a layer's weight or bias, and merges of networks that do not match.

ComfyUI patches (merges, LoRAs) the parameters of layers while it loads a model. Of modules that hold other modules it
loads no parameters, and with dynamic VRAM it patches weights and biases only. Ours that are left out by that are
ConsistI2V's `alpha` and rotary `freqs`, and ConsisID's `latents`, `proj_out` and learned positions.
"""

import logging
from functools import partial

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.utils
import torch

KEY = "consistent_video.parameters"


def install(patcher: comfy.model_patcher.ModelPatcher, title: str) -> None:
    """Look at the weight patches whenever this patcher, or a clone of it, is loaded.

    Args:
        title: what users call the network.
    """
    patcher.add_callback_with_key(comfy.patcher_extension.CallbacksMP.ON_LOAD, KEY, partial(_on_load, title))


def _on_load(title: str, patcher: comfy.model_patcher.ModelPatcher, device: torch.device, *_) -> None:
    check_merges(patcher, title)
    patch_bare_parameters(patcher, device)


def patch_bare_parameters(patcher: comfy.model_patcher.ModelPatcher, device: torch.device) -> None:
    """Patch the parameters that ComfyUI leaves out, in float32: they are few, and angles lose much in 16 bits."""
    keys = [key for key in patcher.patches if not _is_of_layer(patcher.model, key)]
    patch_again(patcher, keys, device)
    for key in keys:
        original = patcher.backup[key].weight
        precise = comfy.model_management.cast_to_device(original, device, torch.float32, copy=True)
        patched = comfy.lora.calculate_weight(patcher.patches[key], precise, key)
        comfy.utils.set_attr_param(patcher.model, key, patched.to(original.dtype))


def patch_again(patcher: comfy.model_patcher.ModelPatcher, keys: list[str], device: torch.device) -> None:
    """Patch the parameters `keys` from their unpatched values, whether they are patched already or not."""
    for key in keys:
        original = patcher.backup.get(key)
        if original is not None and original.inplace_update:
            comfy.utils.copy_to_param(patcher.model, key, original.weight)
        elif original is not None:
            comfy.utils.set_attr_param(patcher.model, key, original.weight)
        patcher.patch_weight_to_device(key, device_to=device)


def _is_of_layer(model: torch.nn.Module, key: str) -> bool:
    name, _, parameter = key.rpartition(".")
    return parameter in ("weight", "bias") and hasattr(comfy.utils.get_attr(model, name), "comfy_cast_weights")


def check_merges(patcher: comfy.model_patcher.ModelPatcher, title: str) -> None:
    """Look whether what is merged into a network comes from a network of the same kind.

    Raises:
        ValueError: weights to merge have another shape.
    """
    state = patcher.model.state_dict()
    # patches of a merge are lists that begin with the other network's weight
    merged = {key: patch[1][0][0] for key, patches in patcher.patches.items() for patch in patches if _is_merge(patch)}
    misshapen = [key for key, weight in merged.items() if weight.shape != state[key].shape]
    if misshapen:
        key = misshapen[0]
        raise ValueError(
            f"{len(misshapen)} of {len(merged)} weights to merge into {title} have another shape, for example {key}: "
            f"{tuple(merged[key].shape)} instead of {tuple(state[key].shape)}. The other MODEL is of another family or "
            "size; merge MODELs of one family."
        )
    network = [key for key in state if key.startswith("diffusion_model.")]
    if merged and not all(key in merged for key in network):
        logging.warning(
            "Merging changes %d of %d parameters of %s: the other MODEL does not have the others. Merge MODELs of one "
            "family, unless you merge parts on purpose.",
            sum(key in merged for key in network),
            len(network),
            title,
        )


def _is_merge(patch: tuple) -> bool:
    return isinstance(patch[1], list) and patch[3] is None
