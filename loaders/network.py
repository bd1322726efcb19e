"""Configuration + state dict -> a network whose weights are the file's own memory, checked key by key."""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch

from ..models.adopt import adopt
from .config_fields import NETWORK_NEUTRAL, NETWORK_UNREAD, Fields

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
        network_class: the class; configuration fields that it does not know are named in a warning, unless they have a
            value that changes nothing.
        config: content of config.json.
        source: what to call the configuration in an error.

    Raises:
        ValueError: the configuration does not describe a network of this class.
    """
    known = inspect.signature(network_class.__init__).parameters
    settings = {key: value for key, value in config.items() if key in known}
    read = [key for key in settings if key not in NETWORK_UNREAD]
    Fields(network_class.__name__, used=read, neutral=NETWORK_NEUTRAL).check(config, source)
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


def static_patcher(patcher: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A patcher of the same model that does not stream weights on demand, for ComfyUI's `disable_dynamic`."""
    return comfy.model_patcher.ModelPatcher(patcher.model, patcher.load_device, patcher.offload_device)


def _storage_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    small = tensor.ndim < 2 and dtype.itemsize == 1
    return torch.bfloat16 if small else dtype


def choose_dtypes(
    state: dict[str, torch.Tensor], weight_dtype: str, supported: list[torch.dtype], title: str = "The network"
) -> tuple[torch.dtype, torch.dtype | None]:
    """Types of storage and of computation (None: the same) for these weights on the current device.

    ComfyUI's rules, except that a network computes in a type outside of `supported` only where ComfyUI was started with
    an option that says so. A device without a 16-bit type of `supported` computes in float32, from weights that keep
    the 16 bits of their file.

    Args:
        weight_dtype: a key of `WEIGHT_DTYPES`.
        supported: types the network computes well in, preferred first.
        title: name of the network in log lines.
    """
    management, args = comfy.model_management, comfy.cli_args.args
    device = management.get_torch_device()
    dtype = WEIGHT_DTYPES[weight_dtype] or _default_dtype(state, supported, device)
    cast = management.unet_manual_cast(dtype, device, supported)
    if torch.float16 in supported:
        return dtype, cast
    if (cast or dtype) == torch.float16:
        if args.fp16_unet or args.force_fp16:
            logging.warning(
                "%s computes in float16, because ComfyUI was started with --%s. It was trained in bfloat16, and in "
                "float16 networks of its class give black frames: leave the option out if this one does.",
                title,
                "force-fp16" if args.force_fp16 else "fp16-unet",
            )
            return dtype, cast
        cast = torch.bfloat16 if management.should_use_bf16(device) else torch.float32
    if not management.is_device_cpu(device):
        _log_computation(title, dtype, cast or dtype, device)
    return dtype, cast


def _default_dtype(state: dict[str, torch.Tensor], supported: list[torch.dtype], device: torch.device) -> torch.dtype:
    """Type of storage where the user left it open."""
    management, args, in_file = comfy.model_management, comfy.cli_args.args, comfy.utils.weight_dtype(state)
    dtype = management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(state),
        supported_dtypes=[torch.float16, *supported] if args.force_fp16 else supported,
        weight_dtype=in_file,
    )
    # float32 would only double what was loaded: ComfyUI takes it for speed where it fits, and this network is large
    half = in_file in (torch.float16, torch.bfloat16)
    no_half = dtype == torch.float32 and torch.float16 not in supported and not args.fp32_unet
    return in_file if half and no_half and not management.is_device_cpu(device) else dtype


def _log_computation(title: str, stored: torch.dtype, computed: torch.dtype, device: torch.device) -> None:
    name = str(computed).removeprefix("torch.")
    if stored == torch.float16:
        logging.warning(
            "%s stores its weights in float16 but computes in %s: in float16 networks of its class give black frames.",
            title,
            name,
        )
    elif computed == torch.float32 and not comfy.model_management.should_use_bf16(device):
        logging.info("%s computes in float32, which takes longer: ComfyUI finds no bfloat16 on this device.", title)
