"""Tells ComfyUI how much memory a UNet needs that reads a character bank.

ComfyUI makes room for a run by the size of its latents, which say nothing of a bank. It asks twice: before the run,
when it decides how many of the weights stay on the device, and at every step, when it decides how many prompts share a
call. The first answer is given by latents as large as the memory they stand for, as ComfyUI's context windows give
theirs; the second by conditioning whose shape counts, as ComfyUI's reference latents do.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import comfy.conds
import comfy.model_management
import comfy.model_patcher
from comfy.patcher_extension import WrappersMP

from .character_bank import CharacterBank

KEY = "consistent_self_attention_bank"
COUNTED = "memory_usage_factor_conds"  # attribute of ComfyUI's models: names of conditioning whose shape counts
# Alive at the peak for each token that a prompt reads in the layer that reads most: in the longer context, its keys and
# values, and fetched ahead for the next layer. Counted; a test counts them again.
COPIES = 4
# ComfyUI's estimates are 1.25 times (SD 1.5) to 1.66 times (SDXL) of what a call without a bank needs by count. This
# part of one is free for a bank.
SPARE = 0.2


class _Announced(comfy.conds.CONDConstant):
    """Conditioning that is nothing but its size."""

    def size(self, **options) -> list:
        return self.cond


class BankMemory:
    """The memory for what one prompt reads of a bank, at the layer that reads most.

    Args:
        bank: what is read.
        characters: whose tokens, one after the other.
    """

    def __init__(self, bank: CharacterBank, characters: Sequence[str]):
        layers = Counter()
        for name in characters:
            longest = {}
            for slot, tokens in bank.characters[name].items():
                longest[slot.layer] = max(longest.get(slot.layer, 0), tokens.numel())
            layers.update(longest)
        self.elements = COPIES * max(layers.values(), default=0)

    def install(self, model: comfy.model_patcher.ModelPatcher) -> None:
        """Announce the memory of every run of a model."""
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, self.prepare)
        model.add_object_patch(COUNTED, (*model.get_model_object(COUNTED), KEY))

    def prepare(self, executor: Callable, model: comfy.model_patcher.ModelPatcher, noise_shape, conds, *args, **kwargs):
        """Wrapper of what loads the models of a run; latents grow by the share of memory that the bank needs more."""
        shape = list(noise_shape)
        shape[0] = panels_at_once(shape[0], kwargs.get("model_options"))
        area = self.area(model, shape)
        for prompts in conds.values():
            for prompt in prompts or ():
                prompt["model_conds"] = {**prompt.get("model_conds", {}), KEY: _Announced([1, 1, area])}
        height = noise_shape[2] * (1 + area / (shape[0] * math.prod(shape[2:])))
        return executor(model, [*noise_shape[:2], math.ceil(height), *noise_shape[3:]], conds, *args, **kwargs)

    def area(self, model: comfy.model_patcher.ModelPatcher, shape: Sequence[int]) -> float:
        """Latent pixels, for one prompt, that ComfyUI would count for the memory that its estimate lacks.

        Args:
            shape: of the latents of the panels that are drawn at once, (P, C, h, w).
        """
        estimate = model.model.memory_required(shape)
        needed = self.elements * comfy.model_management.dtype_size(model.model.get_dtype_inference())
        return max(0.0, needed - SPARE * estimate) / estimate * shape[0] * math.prod(shape[2:])


def panels_at_once(panels: int, model_options: dict | None) -> int:
    """How many of the panels of a batch a call holds: all, or those of one of ComfyUI's context windows."""
    windows = (model_options or {}).get("context_handler")
    return panels if windows is None or windows.dim != 0 else min(panels, windows.context_length)
