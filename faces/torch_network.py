"""Small torch networks of other libraries under ComfyUI's memory management."""

from collections.abc import Callable

import comfy.model_management
import comfy.model_patcher
import torch


def assign_weights(network: torch.nn.Module, state: dict[str, torch.Tensor], source: str) -> torch.nn.Module:
    """Give a network built on the meta device its weights; returns it, ready for inference.

    Raises:
        ValueError: keys or shapes differ.
    """
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{source} does not fit {type(network).__name__}: {error}. Restore the published file."
        ) from error
    return network.requires_grad_(False).eval()


def in_single(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict in float32, for networks whose layers do not cast their weights."""
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def managed(network: torch.nn.Module) -> comfy.model_patcher.ModelPatcher:
    """A patcher that loads the network where ComfyUI runs text encoders and vision towers (the CPU on small cards)."""
    return comfy.model_patcher.ModelPatcher(
        network,
        load_device=comfy.model_management.text_encoder_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )


def load_fully(patcher: comfy.model_patcher.ModelPatcher) -> torch.device:
    """Load a network with all its weights and tables, which not all of its layers could stream; returns its device."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    return patcher.load_device


def on_meta(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """Build a network without allocating or drawing weights."""
    with torch.device("meta"):
        return build()
