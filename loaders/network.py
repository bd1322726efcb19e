"""Configuration + state dict -> a network whose weights are the file's own memory, checked key by key."""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import comfy.model_management
import comfy.utils
import torch

from ..models.adopt import adopt

WEIGHT_DTYPES = {
    "default": None,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
}


@dataclass(frozen=True)
class Difference:
    """How a state dict differs from what a network expects; `misshapen` holds (key, found shape, expected shape)."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[tuple[str, tuple, tuple]]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def summary(self, examples: int = 3) -> str:
        """One sentence per kind of difference with a few keys each."""
        parts = []
        for label, keys in (("missing", self.missing), ("unexpected", self.unexpected)):
            if keys:
                parts.append(
                    f"{len(keys)} {label} keys ({', '.join(keys[:examples])}{', ...' if len(keys) > examples else ''})"
                )
        if self.misshapen:
            shapes = [f"{key} is {found}, expected {expected}" for key, found, expected in self.misshapen[:examples]]
            parts.append(
                f"{len(self.misshapen)} tensors of another shape "
                f"({'; '.join(shapes)}{'; ...' if len(self.misshapen) > examples else ''})"
            )
        return "; ".join(parts)


def plain_network(build: Callable[[ModuleType], torch.nn.Module]) -> torch.nn.Module:
    """Build one of ComfyUI's networks for `compare`: on the meta device and of torch's own layers.

    With dynamic VRAM, ComfyUI's layers have no weights until they are loaded, so their state dict does not tell which
    keys and shapes a file has to hold.

    Args:
        build: called with the namespace of layers, which ComfyUI's networks take as `operations`.
    """
    with torch.device("meta"):
        return build(torch.nn)


def require_fit(
    state: Mapping[str, torch.Tensor], network: torch.nn.Module, files: Iterable[Path], config_file: Path
) -> None:
    """Refuse weight files whose keys or shapes are not those of the network that `config_file` describes.

    Args:
        state: what the files hold.
        network: has all its weights, on any device; of ComfyUI's networks, what `plain_network` returns.

    Raises:
        ValueError: keys or shapes differ.
    """
    difference = compare(state, network)
    if difference:
        raise ValueError(
            f"{', '.join(map(str, files))} does not fit {config_file}: {difference.summary()}. Restore the published "
            "files."
        )


def compare(state: Mapping[str, torch.Tensor], network: torch.nn.Module) -> Difference:
    """Compare a state dict's keys and shapes with those of a network.

    Args:
        network: has all its weights, on any device (meta included); of ComfyUI's networks, what `plain_network`
            returns.
    """
    expected = network.state_dict()
    return Difference(
        missing=sorted(expected.keys() - state.keys()),
        unexpected=sorted(state.keys() - expected.keys()),
        misshapen=[
            (key, tuple(state[key].shape), tuple(expected[key].shape))
            for key in sorted(expected.keys() & state.keys())
            if state[key].shape != expected[key].shape
        ],
    )


def build_on_meta(network_class: type, config: dict, source: str) -> torch.nn.Module:
    """Build a diffusers network without allocating weights.

    Args:
        network_class: the class; configuration fields that it does not know are ignored with a log line.
        config: content of config.json.
        source: what to call the configuration in an error.

    Raises:
        ValueError: the configuration does not describe a network of this class.
    """
    known = inspect.signature(network_class.__init__).parameters
    settings = {key: value for key, value in config.items() if key in known}
    ignored = sorted(key for key in config.keys() - settings.keys() if not key.startswith("_"))
    if ignored:
        logging.info("%s: ignored configuration fields %s", source, ", ".join(ignored))
    try:
        with torch.device("meta"):
            return network_class(**settings)
    except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError, RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"{source} does not describe a working network: {error}. Restore the published configuration."
        ) from error


def load_network(
    network: torch.nn.Module,
    state: dict[str, torch.Tensor],
    dtype: torch.dtype,
    operations: type,
    replacements: dict,
    source: str,
):
    """Give a network built on the meta device its weights and ComfyUI's layers; returns it.

    Tensors already of type `dtype` are used where they are (memory-mapped), others are converted one by one.
    An 8-bit `dtype` applies to matrices and kernels; norms and biases keep 16 bits. Keys that end in one of the
    network's `keep_in_fp32`, if it has such an attribute, are stored in float32.

    Raises:
        ValueError: keys or shapes differ.
    """
    difference = compare(state, network)
    if difference:
        raise ValueError(f"{source} does not fit the network that its configuration describes: {difference.summary()}.")
    precise = tuple(getattr(network, "keep_in_fp32", ()))
    for key in list(state):
        state[key] = state[key].to(torch.float32 if key.endswith(precise) else _storage_dtype(state[key], dtype))
    network.load_state_dict(state, assign=True)
    return adopt(network.requires_grad_(False).eval(), operations, replacements)


def _storage_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    small = tensor.ndim < 2 and dtype.itemsize == 1
    return torch.bfloat16 if small else dtype


def choose_dtypes(
    state: dict[str, torch.Tensor], weight_dtype: str, supported: list[torch.dtype]
) -> tuple[torch.dtype, torch.dtype | None]:
    """Types of storage and of computation (None: the same) for these weights on the current device, by ComfyUI's rules.

    Args:
        weight_dtype: a key of `WEIGHT_DTYPES`.
        supported: types the network computes well in, preferred first.
    """
    dtype = WEIGHT_DTYPES[weight_dtype]
    if dtype is None:
        parameters = comfy.utils.calculate_parameters(state)
        dtype = comfy.model_management.unet_dtype(
            model_params=parameters, supported_dtypes=supported, weight_dtype=comfy.utils.weight_dtype(state)
        )
    return dtype, comfy.model_management.unet_manual_cast(dtype, comfy.model_management.get_torch_device(), supported)
