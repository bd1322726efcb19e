"""What becomes of a LoRA file that is put on a MODEL of this pack: what it changes, what of it is not used, its scale.

ComfyUI's loaders read a file layer by layer, then clone the MODEL and add the patches. The file is known while its
layers are read, the MODEL when it is cloned; a context variable carries the one to the other.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial

import comfy.model_patcher
import comfy.patcher_extension
import torch
from comfy.weight_adapter.lora import LoRAAdapter

from ..models.parameter_patches import patch_again
from .original_modelscope import key_map

NETWORK = "diffusion_model."
KEY = "consistent_video.lora_files"
# Under this name ComfyUI's loaders attach the metadata of the last LoRA's file.
COMFYUI_METADATA = "lora_metadata"
# Under this name ComfyUI's bypass loaders keep what they put on the layers, of one file at a time.
COMFYUI_BYPASS = "bypass_lora"
EXAMPLES = 3
PART = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?:up|down|mid|A|B)(?:\.default)?(?:\.weight|\.bias)?"
    r"|[._]lora\.(?:up|down)\.weight"
    r"|\.lora_linear_layer\.(?:up|down)\.weight"
    r"|\.lora_magnitude_vector(?:\.weight)?"
    r"|\.(?:hada|lokr|oft)_\w+"
    r"|\.[ab][12]\.weight"
    r"|\.(?:alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|reshape_weight|rescale)"
    r")$"
)
TEXT_LAYERS = ("lora_te", "text_encoder", "text_model.", "resblocks.", "lycoris_text_encoder")
_being_read: ContextVar["LoRAFile | None"] = ContextVar("lora_being_read", default=None)


@dataclass(eq=False)
class LoRAFile:
    """A file of LoRA weights.

    Args:
        layers: names of the layers in it -> names of their tensors.
        used: names of tensors that ComfyUI found a place for; it grows while the file is read.
        sizes: layers of the MODEL that got a LoRA -> how many numbers it changes.
        earlier_metadata: what was attached to the MODEL before this file came.
        settled: its scale is known.
    """

    layers: dict[str, list[str]]
    used: set[str]
    sizes: dict[str, int] = field(default_factory=dict)
    earlier_metadata: dict | None = None
    settled: bool = False

    @classmethod
    def being_read(cls, lora: Mapping[str, torch.Tensor], used: set[str]) -> "LoRAFile":
        """The file whose tensors ComfyUI is giving to layers; `used` is the set in which it keeps what it used."""
        file = _being_read.get()
        if file is None or file.used is not used:
            file = cls(_layers(lora), used)
            _being_read.set(file)
        return file

    def take(self, layer: str, patch: object) -> None:
        """Note that `layer` got `patch`."""
        if isinstance(patch, LoRAAdapter):
            up, down = patch.weights[:2]
            self.sizes[layer] = up.shape[0] * math.prod(down.shape[1:])

    @cached_property
    def depth(self) -> int:
        """Layers per level of the original ModelScope network that the file goes by, 0 for other names."""
        return _depth(self.layers)

    def original_names(self, layer: str) -> list[str]:
        """The original ModelScope name of a layer, if the file goes by such names."""
        name = _original_names(self.depth).get(layer.removeprefix(NETWORK)) if self.depth else None
        return [] if name is None else [name, f"unet.{name}", f"lora_unet_{name.replace('.', '_')}"]

    def report(self, model: torch.nn.Module, title: str) -> None:
        """Log what the file does to a MODEL, as a warning when that is nothing."""
        own = {name: parts for name, parts in self.layers.items() if not name.startswith(TEXT_LAYERS)}
        applied = sum(any(part in self.used for part in parts) for parts in own.values())
        unused = sorted({part for parts in self.layers.values() for part in parts} - self.used)
        line = f"LoRA: {applied} of {len(own)} layers applied"
        if unused:
            more = ", ..." if len(unused) > EXAMPLES else ""
            line += f", {len(unused)} keys not used, for example {', '.join(unused[:EXAMPLES])}{more}"
        if not applied and (own or not self.used):
            logging.warning("%s. The file was made for another model than %s: nothing changes.", line, title)
            return
        misfits = self._misfits(model)
        if misfits:
            logging.warning(
                "%s. %d of them have another shape than the layers of %s and change nothing, for example %s: the file "
                "was made for another model.",
                line,
                len(misfits),
                title,
                misfits[0],
            )
            return
        logging.info("%s.", line)

    def _misfits(self, model: torch.nn.Module) -> list[str]:
        """Layers whose LoRA has another size; one of Stable LoRA for a kernel over time is k times as large."""
        state = model.state_dict()
        misfits = []
        for layer, size in self.sizes.items():
            shape = state[f"{layer}.weight"].shape if f"{layer}.weight" in state else ()
            side = shape[2] if len(shape) == 5 else 1
            if shape and size not in (shape.numel(), side * shape.numel()):
                misfits.append(layer.removeprefix(NETWORK))
        return misfits


def _layers(lora: Iterable[str]) -> dict[str, list[str]]:
    layers = {}
    for key in lora:
        part = PART.match(key)
        layers.setdefault(part["layer"] if part else key, []).append(key)
    return layers


def _depth(layers: Iterable[str]) -> int:
    """Layers per level of the original ModelScope network that a file's layer names belong to, 0 for other names.

    Block 0 comes before the first level, whose layers are the blocks up to its downsampler, `input_blocks.<n>.op`.
    """
    blocks = {
        int(number)
        for name in layers
        for number in re.findall(r"^(?:unet\.|lora_unet_)?input_blocks[._](\d+)[._][012](?:[._]|$)", name)
    }
    if not blocks:
        return 2 if any("output_blocks" in name or "middle_block" in name for name in layers) else 0
    return next(number for number in range(1, len(blocks) + 2) if number not in blocks) - 1 or 2


@lru_cache(maxsize=4)
def _original_names(depth: int) -> Mapping[str, str]:
    """diffusers' layer name -> original name, of a network of four levels with `depth` layers each."""
    widths = (1, 2, 3, 4)  # a name for every convolution that a change of width may need
    names = key_map(widths, depth).items()
    return {new.removesuffix(".weight"): old.removesuffix(".weight") for old, new in names if new.endswith(".weight")}


def watch(patcher: comfy.model_patcher.ModelPatcher, title: str) -> None:
    """Report on LoRA files that are put on this MODEL or a clone of it, and scale them as they say.

    Args:
        title: what users call the network.
    """
    callbacks = comfy.patcher_extension.CallbacksMP
    patcher.add_callback_with_key(callbacks.ON_CLONE, KEY, partial(_on_clone, title))
    patcher.add_callback_with_key(callbacks.ON_LOAD, KEY, _on_load)


def _on_clone(title: str, patcher: comfy.model_patcher.ModelPatcher, clone: comfy.model_patcher.ModelPatcher) -> None:
    _settle(patcher)
    file = _being_read.get()
    if file is None:
        return
    _being_read.set(None)
    file.report(patcher.model, title)
    file.earlier_metadata = patcher.get_attachment(COMFYUI_METADATA)
    files = (*(patcher.get_attachment(KEY) or ()), file)
    clone.set_attachments(KEY, files)
    clone.injections = _beside_earlier_bypass(clone.injections, len(files))


def _beside_earlier_bypass(injections: dict[str, list], number: int) -> dict[str, list]:
    """Injections of a MODEL, with the bypass LoRA that it has under another name than ComfyUI gives to the next.

    ComfyUI goes through injections in order, both when it puts them on the layers and when it takes them off; what came
    first has to go last.
    """
    renamed = {}
    for name, injected in injections.items():
        if name != COMFYUI_BYPASS or not injected:
            renamed[name] = injected
            continue
        injection = comfy.patcher_extension.PatcherInjection
        renamed[f"{KEY}.{number}.on"] = [injection(inject=one.inject, eject=_nothing) for one in injected]
        renamed[COMFYUI_BYPASS] = []
        renamed[f"{KEY}.{number}.off"] = [injection(inject=_nothing, eject=one.eject) for one in reversed(injected)]
    return renamed


def _nothing(patcher: comfy.model_patcher.ModelPatcher) -> None:
    pass


def _on_load(patcher: comfy.model_patcher.ModelPatcher, device: torch.device, *_) -> None:
    patch_again(patcher, [key for key in _settle(patcher) if key in patcher.backup], device)


def _settle(patcher: comfy.model_patcher.ModelPatcher) -> list[str]:
    """Give the LoRAs of the last file the scale that its metadata says; returns the parameters that they patch."""
    files = patcher.get_attachment(KEY)
    if not files or files[-1].settled:
        return []
    file = files[-1]
    file.settled = True
    metadata = patcher.get_attachment(COMFYUI_METADATA)
    if metadata is None or metadata is file.earlier_metadata:
        return []
    scales, scaled = MetadataScales(metadata), []
    for key, patches in patcher.patches.items():
        for adapter in (patch[1] for patch in patches):
            if isinstance(adapter, LoRAAdapter) and adapter.loaded_keys is file.used and adapter.weights[2] is None:
                alpha = scales.alpha(key.removeprefix(NETWORK).removesuffix(".weight"), adapter.weights[1].shape[0])
                if alpha is not None:
                    adapter.weights = (*adapter.weights[:2], alpha, *adapter.weights[3:])
                    scaled.append(key)
    return scaled


class MetadataScales:
    """Alpha of each layer by a file's metadata: of peft's configuration as diffusers keeps it, or of plain entries.

    Args:
        metadata: of a safetensors file.
    """

    def __init__(self, metadata: Mapping[str, str]):
        self.plain = next(
            (
                metadata[name]
                for name in ("lora_alpha", "network_alpha", "ss_network_alpha", "alpha")
                if name in metadata
            ),
            None,
        )
        try:
            peft = dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))
        except (TypeError, ValueError):
            peft = {}
        self.peft = {
            name.split(".", 1)[1]: value for name, value in peft.items() if name.startswith(("unet.", "transformer."))
        }

    def alpha(self, layer: str, rank: int) -> float | None:
        """Alpha of a layer whose LoRA has `rank`; None where the metadata says nothing that can be read."""
        value = self.peft.get("lora_alpha", self.plain)
        for pattern, special in (self.peft.get("alpha_pattern") or {}).items():
            if layer == pattern or layer.endswith(f".{pattern}"):
                value = special
        try:
            alpha = float(value)
        except (TypeError, ValueError):
            return None
        return alpha * math.sqrt(rank) if self.peft.get("use_rslora") else alpha
