"""Networks in single files of ComfyUI's `diffusion_models` folders."""

from collections.abc import Mapping
from pathlib import Path

import comfy.model_patcher
import folder_paths
import torch

from . import fingerprint, original_modelscope
from .assembly import assemble, published_latent_format
from .families import FAMILIES, Family
from .network import build_on_meta
from .weights import read_weights

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "module.")


def list_files() -> list[str]:
    """Names of the files in the `diffusion_models` folders."""
    return folder_paths.get_filename_list("diffusion_models")


def find_file(name: str) -> Path:
    """The path of a listed file.

    Raises:
        FileNotFoundError: no `diffusion_models` folder holds it.
    """
    path = folder_paths.get_full_path("diffusion_models", name)
    if path is None:
        raise FileNotFoundError(
            f"{name} was not found in {', '.join(folder_paths.get_folder_paths('diffusion_models'))}."
        )
    return Path(path)


def fingerprint_file(name: str | None) -> str:
    """Changes with the file; see `fingerprint.of_choice`."""
    return fingerprint.of_choice(name, list_files, lambda each: fingerprint.of_file(find_file(each)))


def strip_prefix(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict without the prefix that some releases put before every key of the network."""
    for prefix in PREFIXES:
        network = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        if network:
            return network
    return dict(state)


def network_keys(state: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """The network's state dict under diffusers' key names, from any layout; `source` names it in errors."""
    if original_modelscope.is_original_modelscope(state):
        return original_modelscope.convert(state, source)
    return strip_prefix(state)


def detect_family(state: Mapping[str, torch.Tensor]) -> Family | None:
    """The family whose network has these (diffusers) keys, None when it is none of ours."""
    return next((family for family in FAMILIES.values() if family.marker in state), None)


def network_config(family: Family, state: Mapping[str, torch.Tensor]) -> dict:
    """The configuration of a family's network read from its shapes; what shapes do not tell is as published."""
    if family.parts.describe is not None:
        return family.parts.describe(state)
    down = _count(state, "down_blocks.{}.resnets.0.conv1.weight")
    attention = [f"down_blocks.{level}.attentions.0.proj_in.weight" in state for level in range(down)]
    text = next(
        (
            value
            for key, value in state.items()
            if key.endswith("attn2.to_k.weight") and ".attentions." in key and "temp_" not in key
        ),
        None,
    )
    widths = [_size(state, f"down_blocks.{level}.resnets.0.conv1.weight", 0, 0) for level in range(down)]
    heads = {"attention_head_dim": [width // 64 for width in widths]} if family.blocks == "2D" else {}
    return heads | {
        "in_channels": _size(state, "conv_out.weight", 0, 4),
        "out_channels": _size(state, "conv_out.weight", 0, 4),
        "block_out_channels": widths,
        "layers_per_block": _count(state, "down_blocks.0.resnets.{}.conv1.weight"),
        "cross_attention_dim": 1024 if text is None else text.shape[1],
        "down_block_types": [f"{'CrossAttn' * has}DownBlock{family.blocks}" for has in attention],
        "up_block_types": [f"{'CrossAttn' * has}UpBlock{family.blocks}" for has in reversed(attention)],
    }


def _count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many consecutive indices 0, 1, ... of a key pattern exist."""
    index = 0
    while pattern.format(index) in state:
        index += 1
    return index


def _size(state: Mapping[str, torch.Tensor], key: str, axis: int, default: int) -> int:
    return state[key].shape[axis] if key in state else default


def load_file(
    path: Path, family_name: str, weight_dtype: str, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Load a network from one file.

    Args:
        path: a file of weights.
        family_name: a key of `FAMILIES`, or "auto".
        weight_dtype: as of `loaders.network.WEIGHT_DTYPES`.

    Raises:
        ValueError: the file is damaged, of another family, or has missing, unexpected or misshapen keys.
    """
    state = network_keys(read_weights([path]), str(path))
    family = choose_family(path, state, family_name)
    state = family.parts.prepare(state)
    network = build_on_meta(family.network, network_config(family, state), str(path))
    latent_format = published_latent_format(family)
    patcher = assemble(
        family, network, state, weight_dtype, family.scheduler, latent_format, str(path), disable_dynamic
    )
    patcher.cached_patcher_init = (load_file, (path, family_name, weight_dtype))
    return patcher


def choose_family(path: Path, state: Mapping[str, torch.Tensor], family_name: str) -> Family:
    """The family of a state dict, which has to be the named one unless that is "auto"; else a ValueError."""
    detected = detect_family(state)
    if detected is not None and family_name in ("auto", detected.name):
        return detected
    wanted = FAMILIES.values() if family_name == "auto" else [FAMILIES[family_name]]
    found = detected.title if detected else f"keys such as {', '.join(sorted(state)[:3])}"
    raise ValueError(
        f"{path} is not a network of {' or '.join(family.title for family in wanted)}: found {found}. "
        "Choose another file, or load it with the node made for it."
    )
