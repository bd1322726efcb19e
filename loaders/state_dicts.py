"""What trainers and tools put around and between a network's tensors: nesting, prefixes of wrappers, scaled weights."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

# Names under which trainers keep a network beside counters and optimizers; the first that holds tensors is taken.
NESTS = (
    *("state_dict", "model_state_dict", "model", "module", "unet", "transformer", "diffusion_model", "network", "net"),
    *("params", "weights", "generator", "ema_state_dict", "ema_model", "model_ema", "params_ema", "ema"),
)
MAX_NESTING = 4
# What torch.compile, FSDP, DeepSpeed and checkpointing leave inside the names of the modules that they wrap.
WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")
SCALES = (".scale_weight", ".weight_scale")
# What goes with scaled weights and is used by quantised layers only.
SCALED_EXTRAS = (".scale_input", ".input_scale", ".comfy_quant")
SCALED_MARKER = "scaled_fp8"
# Parts of weights that were packed into integers, by who packs so.
PACKED = {
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".qweight": "GPTQ or AWQ",
    ".weight_scale_2": "NVFP4",
}


def unwrap(path: Path, content: Mapping) -> dict:
    """The named tensors of a file, whatever they are nested in, under names without those of wrappers.

    Args:
        path: of the file.
        content: what the file holds.

    Raises:
        ValueError: the tensors in it have no names.
    """
    content = dict(content)
    for _ in range(MAX_NESTING):
        nests = {str(key): part for key, part in content.items() if isinstance(part, Mapping) and _has_tensors(part)}
        if len(nests) <= sum(isinstance(part, torch.Tensor) and part.ndim > 0 for part in content.values()):
            break
        name = next((name for name in NESTS if name in nests), next(iter(nests)))
        others = sorted(other for other in nests.keys() - {name} if "optim" not in other and "schedul" not in other)
        if others:
            logging.info("%s holds the networks %s: reads %s.", path, ", ".join(sorted([name, *others])), name)
        content = dict(nests[name])
    lists = [str(key) for key, value in content.items() if isinstance(value, list | tuple) and _any_tensor(value)]
    if lists:
        raise ValueError(
            f"{path} holds tensors in a list without names ({lists[0]}), as a moving average or an optimizer keeps "
            "them. Choose the file of the network itself."
        )
    return {WRAPPERS.sub("", key) if isinstance(key, str) else key: value for key, value in _tensors(content).items()}


def _tensors(content: dict) -> dict:
    """A state dict without the counters and settings that stand beside its tensors."""
    if not _any_tensor(content.values()):
        return content
    plain = int | float | str | bytes | bool | None
    return {key: value for key, value in content.items() if not isinstance(value, plain | Mapping | list | tuple)}


def _has_tensors(content: Mapping) -> bool:
    return any(
        isinstance(value, torch.Tensor) or (isinstance(value, Mapping) and _has_tensors(value))
        for value in content.values()
    )


def _any_tensor(values: Iterable) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values)


def unscale(path: Path, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict whose 8-bit weights that come with scales are multiplied by them, as bfloat16.

    Args:
        path: of the file, for errors.
        state: scales are named `<layer>.scale_weight` (ComfyUI, with a marker `scaled_fp8`) or `<layer>.weight_scale`.

    Raises:
        ValueError: weights are packed in a form that only the program that packed them reads.
    """
    packed = next((tool for key in state for end, tool in PACKED.items() if key.endswith(end)), None)
    if packed:
        raise ValueError(
            f"{path} holds weights quantised by {packed}, which this pack does not read. Choose the file of the same "
            "model in fp16, bf16 or fp8."
        )
    scales = {key[: -len(end)] + ".weight": key for end in SCALES for key in state if key.endswith(end)}
    if not scales and SCALED_MARKER not in state:
        return state
    plain = {
        key: value
        for key, value in state.items()
        if not key.endswith((*SCALES, *SCALED_EXTRAS)) and not key.endswith(SCALED_MARKER)
    }
    for key, scale_key in scales.items():
        weight, scale = plain.get(key), state[scale_key]
        if weight is None or not weight.is_floating_point():
            raise ValueError(
                f"{path} has a scale {scale_key} without a weight {key} of 8-bit floats. Download the file again."
            )
        if scale.numel() not in (1, weight.shape[0]):
            raise ValueError(
                f"{path} has {scale.numel()} scales for {key} of shape {tuple(weight.shape)}: this pack reads one for "
                "the weight or one for each row. Choose the file of the same model in fp16, bf16 or plain fp8."
            )
        scale = scale.float().reshape(-1, *[1] * (weight.ndim - 1))
        plain[key] = (weight.float() * scale).to(torch.bfloat16)
    return plain
