"""LoRA names of diffusers' trainers for networks that keep diffusers' key names.

ComfyUI already maps `lora_unet_<key with underscores>` (kohya) and `diffusion_model.<key>` onto any network. Trainers
of diffusers write
`unet.<key>`, `transformer.<key>` and older spellings instead, which ComfyUI maps for its own networks only.
"""

import comfy.weight_adapter
import torch
from comfy.weight_adapter.lora import LoRAAdapter

NETWORK = "diffusion_model."
BLOCKS = (
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "transformer_in.",
    "transformer_blocks.",
    "perceiver_cross_attention.",
)
PREFIXES = ("unet.", "", "base_model.model.", "unet.base_model.model.", "transformer.")


def diffusers_names(key: str) -> list[str]:
    """The names under which diffusers and peft have saved a layer `key`, such as `mid_block.attentions.0.proj_in`."""
    parent, _, layer = key.removesuffix(".0").rpartition(".")
    names = [key, f"{parent}.processor.{layer}"] if layer.startswith("to_") else [key]
    return [prefix + name for name in names for prefix in PREFIXES]


class DiffusersLoRAAdapter(LoRAAdapter):
    """A LoRA stored under one of diffusers' names."""

    name = "diffusers_lora"

    @classmethod
    def load(
        cls,
        x: str,
        lora: dict[str, torch.Tensor],
        alpha: float | None,
        dora_scale: torch.Tensor | None,
        loaded_keys: set[str] | None = None,
        **options,
    ) -> LoRAAdapter | None:
        """The LoRA of network layer `x` (`diffusion_model.<key>`) in a file's tensors, None when it has none."""
        key = x.removeprefix(NETWORK)
        if key == x or not key.startswith(BLOCKS):
            return None
        loaded_keys = set() if loaded_keys is None else loaded_keys
        for name in diffusers_names(key):
            own_alpha = _scalar(lora, f"{name}.alpha", loaded_keys, alpha)
            adapter = super().load(name, lora, own_alpha, dora_scale, loaded_keys, **options)
            if adapter is not None:
                return adapter
        return None


def _scalar(lora: dict[str, torch.Tensor], key: str, loaded_keys: set[str], default: float | None) -> float | None:
    if key not in lora:
        return default
    loaded_keys.add(key)
    return lora[key].item()


def register() -> None:
    """Add the names to ComfyUI's list of adapter formats (once)."""
    if DiffusersLoRAAdapter not in comfy.weight_adapter.adapters:
        comfy.weight_adapter.adapters.append(DiffusersLoRAAdapter)
