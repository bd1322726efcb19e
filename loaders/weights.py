"""Weight files -> state dicts: finding the right variant, reading shards, refusing what is damaged.

Everything goes through `comfy.utils.load_torch_file`: safetensors are memory-mapped, pickled files are restricted to
tensors.
"""

import glob
import logging
import pickle
import re
import struct
from pathlib import Path

import comfy.utils
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from .file_contents import SAFE_SUFFIXES, SAFETENSORS, kind_of
from .folders import read_config
from .state_dicts import unscale, unwrap

SUFFIXES = (".safetensors", ".bin")
HALF_VARIANTS = ("fp16", "bf16")
SHARD = re.compile(r"-(?P<number>\d+)-of-(?P<count>\d+)")
# What downloads are called until they are complete.
UNFINISHED = (".part", ".partial", ".crdownload", ".incomplete", ".aria2", ".download", ".tmp", ".lock")
# What reading a damaged file raises, ComfyUI's own reader of safetensors (with dynamic VRAM) included.
DAMAGE = (EOFError, KeyError, OSError, RuntimeError, ValueError, struct.error)
HALF_TYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)


def find_weights(folder: Path, stem: str, prefer_half: bool = False) -> list[Path]:
    """The files that hold a component's weights: one, or its shards.

    Args:
        folder: the component's folder, such as `<checkpoint>/unet`.
        stem: published file name without suffix, such as `diffusion_pytorch_model`.
        prefer_half: take a 16-bit variant (`.fp16`, `.bf16`) when there are others.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
    """
    for suffix in SUFFIXES:
        found = {}
        for path in sorted(folder.glob(f"{glob.escape(stem)}*{suffix}*")):
            named = re.fullmatch(_name_pattern(stem, suffix), path.name)
            if named and path.is_file():
                variant = named["variant"] or named["index_variant"] or named["shard_variant"] or ""
                found.setdefault(variant, []).append(path)
        if found:
            variant = min(found, key=lambda name: _rank(name, prefer_half))
            if len(found) > 1 or variant not in ("", *HALF_VARIANTS):
                names = ", ".join(name or "the plain one" for name in sorted(found))
                logging.info("%s: of the variants %s, reads %s.", folder, names, variant or "the plain one")
            return _files(folder, stem, suffix, found[variant])
    raise FileNotFoundError(_no_weights(folder, stem))


def _name_pattern(stem: str, suffix: str) -> str:
    """Names of whole files, indices and shards; library versions put the variant before or after `.index`."""
    stem, suffix = re.escape(stem), re.escape(suffix)
    variant = r"[A-Za-z]\w*"
    return (
        rf"{stem}(?:\.(?P<variant>{variant}))?{suffix}(?P<index>\.index(?:\.(?P<index_variant>{variant}))?\.json)?"
        rf"|{stem}(?:\.(?P<shard_variant>{variant}))?(?P<shard>-\d+-of-\d+)(?:\.{variant})?{suffix}"
    )


def _rank(variant: str, prefer_half: bool) -> tuple[int, str]:
    """Place of a variant among those that are there, the lowest is taken; weights before averaging come last."""
    preferred = (*HALF_VARIANTS, "") if prefer_half else ("", *HALF_VARIANTS)
    order = (*preferred, "fp32", "ema")
    return (order.index(variant) if variant in order else len(order) + ("non_ema" in variant), variant)


def _files(folder: Path, stem: str, suffix: str, paths: list[Path]) -> list[Path]:
    """The whole file of a variant, else the shards that its index names, else the shards that lie there."""
    whole = [path for path in paths if path.name.endswith(suffix) and not SHARD.search(path.name)]
    if whole:
        return whole[:1]
    index = next((path for path in paths if path.name.endswith(".json")), None)
    if index is not None:
        return _shards(index)
    count = int(SHARD.search(paths[0].name)["count"])
    numbers = {int(SHARD.search(path.name)["number"]) for path in paths}
    missing = [str(number) for number in range(1, count + 1) if number not in numbers]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks the shards {', '.join(missing)} of {count} of {stem}. Download them into the same folder."
        )
    return paths


def _no_weights(folder: Path, stem: str) -> str:
    expected = ", ".join(f"{stem}{suffix}" for suffix in (*SUFFIXES, ".fp16.safetensors", ".safetensors.index.json"))
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    found = ", ".join(names) or ("nothing" if folder.is_dir() else "the folder does not exist")
    unfinished = [name for name in names if name.endswith(UNFINISHED)]
    remedy = (
        f"The download of {', '.join(unfinished)} has not finished: let it, or start it again."
        if unfinished
        else "Download the missing files."
    )
    return f"No weights in {folder}: expected one of {expected}; found: {found}. {remedy}"


def transformers_stem(folder: Path) -> str:
    """File name stem of a component that transformers saved: `model*.safetensors`, but `pytorch_model*.bin`."""
    return "pytorch_model" if any(folder.glob("pytorch_model*")) and not any(folder.glob("model*")) else "model"


def _shards(index: Path) -> list[Path]:
    names = sorted(set(read_config(index).get("weight_map", {}).values()))
    if not names or any(Path(name).name != name for name in names):
        raise ValueError(f"{index} has no usable 'weight_map' of shard files. Download the index again.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names shards that are missing: {', '.join(missing)}. Download them into the same folder."
        )
    return [index.parent / name for name in names]


def read_weights(files: list[Path]) -> dict[str, torch.Tensor]:
    """Read one or more weight files into one state dict of finite tensors.

    Nesting and the names of wrappers are taken off, and scaled 8-bit weights multiplied by their scales; see
    `state_dicts`.

    Raises:
        ValueError: a file is damaged, holds something other than tensors, or holds NaN or infinite values.
    """
    state = {}
    for path in files:
        part = unwrap(path, read_file(path))
        check_tensors(path, part)
        state.update(part)
    return unscale(files[0], state)


class NoNamedTensorsError(ValueError):
    """A file that holds one object instead of named tensors; `found` says which."""

    def __init__(self, path: Path, found: str):
        super().__init__(f"{path} should hold named tensors, found {found}. Choose a file of weights.")
        self.found = found


def read_file(path: Path) -> dict:
    """What a weight file holds: named tensors, or nested dictionaries of them.

    Raises:
        NoNamedTensorsError: the file holds a list, a single tensor or another object.
        ValueError: the file is damaged, or holds pickled objects that could run code.
    """
    kind = kind_of(path)
    try:
        if kind == SAFETENSORS and path.suffix.lower() not in SAFE_SUFFIXES:
            return load_file(path)  # ComfyUI goes by the name
        content = comfy.utils.load_torch_file(str(path))
    except (AttributeError, TypeError) as error:
        if kind == SAFETENSORS:
            raise _damaged(path, error) from error
        # ComfyUI looks into what it unpickled as if it were a dictionary, the newer the further
        raise NoNamedTensorsError(path, f"an object of another kind ({error})") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is damaged, or holds pickled objects other than tensors, which could run code and are refused. "
            "Get the .safetensors version of this file from the original publisher."
        ) from error
    except (*DAMAGE, SafetensorError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise NoNamedTensorsError(path, f"a {type(content).__name__}")
    return content


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} ({path.stat().st_size:,} bytes) is damaged or incomplete: {error}. Compare its size with the "
        "published one and download it again."
    )


def check_tensors(path: Path, state: dict) -> None:
    """Refuse what is no state dict of finite tensors.

    Raises:
        ValueError: see above.
    """
    foreign = [str(key) for key, value in state.items() if not isinstance(value, torch.Tensor)]
    if foreign or not state:
        found = f"other objects under {', '.join(foreign[:3])}" if foreign else "nothing"
        raise ValueError(f"{path} should hold named tensors only, found {found}. Choose a file of weights.")
    broken = [key for key, value in state.items() if not _is_finite(value)]
    if broken:
        raise ValueError(
            f"{path} has NaN or infinite values in {len(broken)} tensors ({', '.join(broken[:3])}). The file is "
            "damaged; download it again."
        )


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all values are finite; one fused pass, without a mask as large as the tensor."""
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.to(torch.float16)
    return bool(tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32).isfinite())
