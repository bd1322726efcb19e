"""Weight files -> state dicts: finding the right variant, reading shards, refusing what is damaged.

Everything goes through `comfy.utils.load_torch_file`: safetensors are memory-mapped, pickled files are restricted to
tensors.
"""

import pickle
import struct
from pathlib import Path

import comfy.utils
import torch
from safetensors import SafetensorError

from .folders import read_config

SUFFIXES = (".safetensors", ".bin")
SAFE_SUFFIXES = (".safetensors", ".sft")
# What reading a damaged file raises, ComfyUI's own reader of safetensors (with dynamic VRAM) included.
DAMAGE = (EOFError, KeyError, OSError, RuntimeError, ValueError, struct.error)
HALF_TYPES = (torch.float16, torch.bfloat16, torch.float8_e4m3fn)


def find_weights(folder: Path, stem: str, prefer_half: bool = False) -> list[Path]:
    """The files that hold a component's weights: one, or the shards that an index names.

    Args:
        folder: the component's folder, such as `<checkpoint>/unet`.
        stem: published file name without suffix, such as `diffusion_pytorch_model`.
        prefer_half: take the `.fp16` variant when both precisions are present.

    Raises:
        FileNotFoundError: no weights, or a shard is missing.
    """
    variants = ("fp16", "") if prefer_half else ("", "fp16")
    for suffix in SUFFIXES:
        for variant in variants:
            single = folder / ".".join(filter(None, (stem, variant, suffix[1:])))
            if single.is_file():
                return [single]
            index = _index_file(folder, stem, variant, suffix)
            if index is not None:
                return _shards(index)
    expected = ", ".join(f"{stem}{suffix}" for suffix in (*SUFFIXES, ".fp16.safetensors", ".safetensors.index.json"))
    present = (
        ", ".join(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else "the folder does not exist"
    )
    raise FileNotFoundError(
        f"No weights in {folder}: expected one of {expected}; found: {present or 'nothing'}. Download the missing "
        "files."
    )


def transformers_stem(folder: Path) -> str:
    """File name stem of a component that transformers saved: `model*.safetensors`, but `pytorch_model*.bin`."""
    return "pytorch_model" if any(folder.glob("pytorch_model*")) and not any(folder.glob("model*")) else "model"


def _index_file(folder: Path, stem: str, variant: str, suffix: str) -> Path | None:
    """The index of a sharded component; library versions put the variant before or after `.index`."""
    names = (
        (f"{stem}{suffix}.index.json",)
        if not variant
        else (f"{stem}{suffix}.index.{variant}.json", f"{stem}.{variant}{suffix}.index.json")
    )
    return next((folder / name for name in names if (folder / name).is_file()), None)


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

    Raises:
        ValueError: a file is damaged, holds something other than tensors, or holds NaN or infinite values.
    """
    state = {}
    for path in files:
        part = read_file(path)
        check_tensors(path, part)
        state.update(part)
    return state


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
    try:
        content = comfy.utils.load_torch_file(str(path))
    except (AttributeError, TypeError) as error:
        if path.suffix in SAFE_SUFFIXES:
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
