"""Networks in single files of ComfyUI's `diffusion_models` folders."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.latent_formats
import comfy.model_patcher
import folder_paths
import torch

from ..models import network_description
from . import fingerprint, original_modelscope
from .assembly import assemble, published_latent_format
from .families import FAMILIES, Family
from .folders import read_config
from .listed_files import as_listed
from .network import build_on_meta
from .state_dicts import unscale, unwrap
from .weights import check_tensors, read_file

OLD_FOLDER = "text2video"
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "unet.", "transformer.", "module.")
TEXT_ENCODER, VAE = "cond_stage_model.", "first_stage_model."


def register_folder() -> None:
    """Tell ComfyUI of `models/text2video`, where the older ModelScope loader kept its file."""
    folder_paths.add_model_folder_path(OLD_FOLDER, str(Path(folder_paths.models_dir) / OLD_FOLDER))


def list_files() -> list[str]:
    """Names of the files in the `diffusion_models` folders, then of those in the `text2video` folders."""
    names = folder_paths.get_filename_list("diffusion_models")
    found = _old_files()
    return [*names, *(name for name in found if name not in names)]


def find_file(name: str) -> Path:
    """The path of a listed file.

    Raises:
        FileNotFoundError: no `diffusion_models` or `text2video` folder holds it.
    """
    name = as_listed(name, list_files())
    path = folder_paths.get_full_path("diffusion_models", name)
    if path is None and name in _old_files():
        path = folder_paths.get_full_path(OLD_FOLDER, name)
    if path is None:
        folders = ", ".join(folder_paths.get_folder_paths("diffusion_models"))
        raise FileNotFoundError(f"{name} was not found in {folders}. Choose a file that the node lists.")
    return Path(path)


def _old_files() -> list[str]:
    """Weights in the `text2video` folders; ComfyUI lists any file there, because the kind has no endings of its own."""
    if OLD_FOLDER not in folder_paths.folder_names_and_paths:
        return []
    names = folder_paths.get_filename_list(OLD_FOLDER)
    return [name for name in names if Path(name).suffix.lower() in folder_paths.supported_pt_extensions]


def fingerprint_file(name: str | None) -> str:
    """Changes with the file; see `fingerprint.of_choice`."""
    return fingerprint.of_choice(name, list_files, lambda each: fingerprint.of_file(find_file(each)))


def strip_prefix(state: Mapping[str, torch.Tensor], source: str = "The file") -> dict[str, torch.Tensor]:
    """The network's part of a state dict, without what releases and trainers put before every key of it.

    Of two networks under different prefixes, such as one and its moving average, the one with the shorter prefix is
    taken, and a log line says so.
    """
    markers = tuple(family.marker for family in FAMILIES.values())
    found = {
        key.removesuffix(marker) for key in state for marker in markers if key == marker or key.endswith(f".{marker}")
    }
    prefixes = sorted(found, key=lambda prefix: ("ema" in prefix, len(prefix), prefix))
    prefixes = prefixes or [prefix for prefix in PREFIXES if any(key.startswith(prefix) for key in state)] or [""]
    if len(prefixes) > 1 and found:
        names = ", ".join(prefix or "without prefix" for prefix in prefixes)
        logging.info("%s holds several networks (%s): reads the first.", source, names)
    prefix = prefixes[0]
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def network_keys(state: Mapping[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """The network's state dict under diffusers' key names, from any layout; `source` names it in errors."""
    if original_modelscope.is_original_modelscope(state):
        return original_modelscope.convert(state, source)
    return strip_prefix(state, source)


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
    file = read_network(path, family_name)
    network = build_on_meta(file.family.network, file.config, str(path))
    patcher = assemble(
        file.family,
        network,
        file.state,
        weight_dtype,
        file.scheduler,
        file.latent_format,
        str(path),
        disable_dynamic,
    )
    patcher.cached_patcher_init = (load_file, (path, family_name, weight_dtype))
    return patcher


@dataclass(frozen=True)
class NetworkFile:
    """What one file tells about a network.

    Args:
        family: the network's.
        state: its weights under diffusers' key names.
        config: fields of its config.json.
        scheduler: diffusers scheduler configuration.
        latent_format: its latent space.
    """

    family: Family
    state: dict[str, torch.Tensor]
    config: dict
    scheduler: dict
    latent_format: comfy.latent_formats.LatentFormat


def read_network(path: Path, family_name: str = "auto") -> NetworkFile:
    """Read a network's weights and what they belong to.

    What shapes do not tell is as the file itself says, if ComfyUI saved it from a MODEL of this pack; else as a
    configuration beside it says, `<name>.json` or the config.json of its folder; else as published.

    Args:
        family_name: a key of `FAMILIES`, or "auto".

    Raises:
        ValueError: the file is damaged, or of another family.
    """
    state = unwrap(path, read_file(path))
    described = state.pop(network_description.KEY, None)
    others = [name for prefix, name in ((TEXT_ENCODER, "a text encoder"), (VAE, "a VAE"))
              if any(key.startswith(prefix) for key in state)]  # fmt: skip
    if others:
        logging.info(
            "%s holds %s too; this loads the network alone. Take CLIP and VAE from the loader of the checkpoint that "
            "it was made from, or save them with Save CLIP and Save VAE and load those.",
            path,
            " and ".join(others),
        )
    state = network_keys(state, str(path))
    check_tensors(path, state)
    state = unscale(path, state)
    family = choose_family(path, state, family_name)
    state = family.parts.prepare(state)
    shapes = network_config(family, state)
    if described is not None:
        try:
            content = network_description.from_tensor(described)
            latent_format = type(published_latent_format(family))(**content["latent_factors"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} was saved by a newer version of this pack ({error}). Update the pack.") from error
        return NetworkFile(family, state, shapes | content["network"], content["scheduler"], latent_format)
    config = shapes | _config_beside(family, path)
    return NetworkFile(family, state, config, family.scheduler, published_latent_format(family))


def _config_beside(family: Family, path: Path) -> dict:
    """Fields of a configuration of the family's network that lies beside a file of weights, none without one."""
    for config_file in (path.with_suffix(".json"), path.parent / "config.json"):
        if config_file.is_file():
            config = read_config(config_file)
            if config.get("_class_name") == family.network_class:
                logging.info("%s: takes the configuration %s.", path, config_file)
                return family.parts.read_fields(config)
    logging.info(
        "%s: what its shapes do not tell is taken as published for %s. If it differs, put its config.json beside it as "
        "%s.",
        path,
        family.title,
        path.with_suffix(".json").name,
    )
    return {}


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
