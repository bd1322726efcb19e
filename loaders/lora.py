"""LoRA names of trainers for networks that keep diffusers' key names, and for their text encoders.

ComfyUI already maps `lora_unet_<key with underscores>` (kohya) and `diffusion_model.<key>` onto any network. The other
spellings, which it maps for its own networks only, are read here: of diffusers and peft (`unet.<key>`,
`transformer.<key>`, also behind `base_model.model.`), SimpleTuner, VideoX-Fun, OneTrainer, and the original ModelScope
names of Stable LoRA, the trainer of ModelScope's finetunes.
"""

import comfy.weight_adapter
import torch
from comfy.weight_adapter.lora import LoRAAdapter
from torch.nn.functional import conv1d, conv2d, conv3d

from .lora_files import NETWORK, LoRAFile

BLOCKS = (
    "conv_in.",
    "conv_out.",
    "conv_norm_out.",
    "time_embedding.",
    "fps_embedding.",
    "frame_stride_embedding.",
    "context_embedding.",
    "image_latents_",
    "down_blocks.",
    "mid_block.",
    "up_blocks.",
    "transformer_in.",
    "patch_embed.",
    "transformer_blocks.",
    "local_facial_extractor.",
    "perceiver_cross_attention.",
    "norm_final.",
    "norm_out.",
    "proj_out.",
)
TEXT_ENCODERS = ("text_encoders.clip_h.transformer.", "text_encoders.t5xxl.transformer.")
PEFT = "base_model.model."
PREFIXES = ("unet.", "", PEFT, f"unet.{PEFT}", "transformer.", f"transformer.{PEFT}", "model.diffusion_model.", NETWORK)
FLAT_PREFIXES = ("lora_unet_", "lora_unet__", "lora_transformer_", "lora_transformer__", "lycoris_", "lycoris_unet_")
TEXT_PREFIXES = ("text_encoder.", "", PEFT, f"text_encoder.{PEFT}")
FLAT_TEXT_PREFIXES = ("lora_te_", "lora_te1_", "lora_te__", "lycoris_text_encoder_")
# Names of a CLIP layer in the original OpenCLIP releases, in which web UIs keep text LoRAs.
OPENCLIP_NAMES = {
    "text_model.encoder.layers.": "resblocks.",
    ".self_attn.": ".attn.",
    ".mlp.fc1": ".mlp.c_fc",
    ".mlp.fc2": ".mlp.c_proj",
}
# Parts of a file that ComfyUI adds to a weight, or to a bias, or puts in its place.
WEIGHT_PATCHES = {"diff": "diff", "w_norm": "diff", "set_weight": "set"}
BIAS_PATCHES = {"diff_b": "diff", "b_norm": "diff"}
CONVOLUTIONS = {1: conv1d, 2: conv2d, 3: conv3d}


def layer_names(layer: str) -> list[str]:
    """The names under which trainers save a layer that ComfyUI knows as `layer`, none for other networks' layers."""
    if layer.startswith(TEXT_ENCODERS):
        key = layer.split(".transformer.", 1)[1]
        openclip = key
        for ours, theirs in OPENCLIP_NAMES.items():
            openclip = openclip.replace(ours, theirs)
        return [prefix + key for prefix in TEXT_PREFIXES] + _flat(key, FLAT_TEXT_PREFIXES) + [openclip]
    key = layer.removeprefix(NETWORK)
    if key == layer or not f"{key}.".startswith(BLOCKS):
        return []
    return diffusers_names(key) + _flat(key, FLAT_PREFIXES)


def diffusers_names(key: str) -> list[str]:
    """The names under which diffusers and peft have saved a layer `key`, such as `mid_block.attentions.0.proj_in`."""
    parent, _, layer = key.removesuffix(".0").rpartition(".")
    names = [key, f"{parent}.processor.{layer}"] if layer.startswith("to_") else [key]
    return [prefix + name for name in names for prefix in PREFIXES]


def _flat(key: str, prefixes: tuple[str, ...]) -> list[str]:
    return [prefix + key.replace(".", "_") for prefix in prefixes]


class DiffusersLoRAAdapter(LoRAAdapter):
    """A LoRA stored under one of a trainer's names; also Stable LoRA's, whose matrices span the sides of a kernel."""

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
    ) -> "comfy.weight_adapter.WeightAdapterBase | WeightPatch | None":
        """What a file has for the parameter that ComfyUI calls `x`, None for nothing or another network's parameter.

        Args:
            x: `diffusion_model.<key>` or `text_encoders.<encoder>.transformer.<key>`, without an end of `.weight`.
            lora: the file's tensors.
            alpha, dora_scale: stored under the name `x` itself; names of trainers have their own.
            loaded_keys: takes up which names of the file are used.
            options: what a newer ComfyUI adds.
        """
        layer, is_bias = (x.removesuffix(".bias"), True) if x.endswith(".bias") else (x, False)
        names = layer_names(layer)
        if not names:
            return None
        used = set() if loaded_keys is None else loaded_keys
        file = LoRAFile.being_read(lora, used)
        for name in (*names, *file.original_names(layer)):
            if name not in file.layers:
                continue
            patch = _of_parts(name, lora, BIAS_PATCHES if is_bias else WEIGHT_PATCHES, used)
            if patch is None and not is_bias:
                patch = cls._of_layer(name, lora, used, **options)
            if patch is not None:
                file.take(layer, patch)
                return patch
        return None

    @classmethod
    def _of_layer(
        cls, name: str, lora: dict, used: set[str], **options
    ) -> comfy.weight_adapter.WeightAdapterBase | None:
        """The adapter of whatever kind that a file has under a layer's `name`."""
        alpha = _take(lora, f"{name}.alpha", used)
        scale = None if alpha is None else alpha.item()
        dora_scale = _take(lora, f"{name}.dora_scale", used)
        magnitude = _take(lora, f"{name}.lora_magnitude_vector", used)
        if magnitude is None:
            magnitude = _take(lora, f"{name}.lora_magnitude_vector.weight", used)
        for adapter_class in comfy.weight_adapter.adapters:
            if adapter_class is cls:
                continue
            adapter = adapter_class.load(name, lora, scale, dora_scale, used, **options)
            if type(adapter) is not LoRAAdapter:
                if adapter is not None:
                    return adapter
                continue
            up, down, scale, mid, dora_scale, reshape = adapter.weights
            if magnitude is not None:
                # peft's name for DoRA's scale, one number for each output
                dora_scale = magnitude.reshape(-1, *[1] * (down.ndim - 1))
            return cls(used, (up, down, scale, mid, dora_scale, reshape))
        return None

    def calculate_weight(
        self,
        weight,
        key,
        strength,
        strength_model,
        offset,
        function,
        intermediate_dtype=torch.float32,
        original_weight=None,
        **kwargs,
    ):
        """As of ComfyUI's LoRA; a kernel of Stable LoRA's form changes by `kernel_change`."""
        if not self.spans_kernel(weight.shape):
            return super().calculate_weight(
                weight,
                key,
                strength,
                strength_model,
                offset,
                function,
                intermediate_dtype,
                original_weight,
                **kwargs,
            )
        change = self.kernel_change(weight.shape, weight.device, intermediate_dtype)
        weight += function((strength * change).type(weight.dtype))
        return weight

    def h(self, x: torch.Tensor, base_out: torch.Tensor, **options) -> torch.Tensor:
        """As of ComfyUI's LoRA, for layers whose weights stay as they are (bypass)."""
        shape = getattr(self, "shape", None)
        if not getattr(self, "is_conv", False) or not self.spans_kernel(shape):
            return super().h(x, base_out, **options)
        change = self.kernel_change(shape, x.device, x.dtype) * getattr(self, "multiplier", 1.0)
        return CONVOLUTIONS[len(shape) - 2](x, change, **getattr(self, "kw_dict", {}))

    def spans_kernel(self, shape: tuple[int, ...] | None) -> bool:
        """Whether the matrices are Stable LoRA's (out k, r k) and (r k, in k) of a kernel (out, in, k, ...)."""
        up, down = self.weights[:2]
        if shape is None or len(shape) < 4 or up.ndim != 2 or down.ndim != 2:
            return False
        side = shape[2]
        return side > 1 and (up.shape[0], down.shape[1]) == (shape[0] * side, shape[1] * side)

    def kernel_change(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """What Stable LoRA adds to a kernel of `shape`: up @ down seen as (out, in, k, k).

        For a kernel over time, (out, in, k, 1, 1), it is seen as (out, in, k, k, 1) and averaged over the second k.
        Source of the formula: ExponentialML/Text-To-Video-Finetuning, stable_lora/lora.py.
        """
        up, down, alpha = self.weights[:3]
        change = up.to(device, dtype) @ down.to(device, dtype)
        side = shape[2]
        square = change.reshape(*shape[:2], side, side)
        if len(shape) == 5:
            square = square.unsqueeze(-1).mean(dim=-2, keepdim=True)
        return square if alpha is None else square * (alpha * side / down.shape[0])


class WeightPatch(tuple):
    """A patch in ComfyUI's own form, such as ("diff", (tensor,)), that remembers which names were used."""

    loaded_keys: set[str]


def _of_parts(name: str, lora: dict, kinds: dict[str, str], used: set[str]) -> WeightPatch | None:
    """A patch that a file has ready-made under a layer's name."""
    for part, kind in kinds.items():
        tensor = _take(lora, f"{name}.{part}", used)
        if tensor is not None:
            patch = WeightPatch((kind, (tensor,)))
            patch.loaded_keys = used
            return patch
    return None


def _take(lora: dict, key: str, used: set[str]) -> torch.Tensor | None:
    if key in lora:
        used.add(key)
    return lora.get(key)


def register() -> None:
    """Add the names to ComfyUI's list of adapter formats (once)."""
    if DiffusersLoRAAdapter not in comfy.weight_adapter.adapters:
        comfy.weight_adapter.adapters.append(DiffusersLoRAAdapter)
