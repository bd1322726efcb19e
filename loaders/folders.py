"""Checkpoints in ComfyUI's `diffusers` folders: listing, finding, reading their configuration."""

import json
import logging
import os
from pathlib import Path

import folder_paths

from . import fingerprint
from .families import Family
from .linked_folders import read_text, walk

MAX_DEPTH = 3


def read_config(path: Path) -> dict:
    """Read a JSON configuration file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing. Download the complete repository folder again: every component needs its "
            "configuration file."
        )
    try:
        config = json.loads(read_text(path))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Download the file again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a JSON {type(config).__name__}, expected an object. Download the file again.")
    return config


def read_config_or(path: Path, default: dict) -> dict:
    """The configuration file at `path`, or `default` when there is none."""
    return read_config(path) if path.is_file() else default


def checkpoint_folders() -> dict[str, Path]:
    """Every folder that looks like a diffusers checkpoint, by its name below the `diffusers` folder."""
    found = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for directory, subdirectories, files in walk(root):
            relative = os.path.relpath(directory, root)
            is_checkpoint = "model_index.json" in files or any(
                name in subdirectories for name in ("unet", "transformer")
            )
            if is_checkpoint and relative != ".":
                found.setdefault(relative.replace(os.sep, "/"), Path(directory))
            if is_checkpoint or relative.count(os.sep) + 1 >= MAX_DEPTH:
                subdirectories.clear()
    return found


def network_class(folder: Path) -> str | None:
    """`_class_name` of the folder's unet or transformer, None when there is no readable configuration.

    The component's own configuration decides: finetunes carry foreign entries in model_index.json.
    """
    for component in ("unet", "transformer"):
        path = folder / component / "config.json"
        if path.is_file():
            try:
                return read_config(path).get("_class_name")
            except ValueError:
                return None
    return None


def list_checkpoints(family: Family) -> list[str]:
    """Names of the folders that hold a checkpoint of a family, sorted.

    Folders whose network configuration is missing or unreadable are listed too: loading one tells what is wrong with
        it.
    """
    names = checkpoint_folders().items()
    return sorted(name for name, folder in names if network_class(folder) in (family.network_class, None))


def find_checkpoint(name: str) -> Path:
    """The folder of a listed checkpoint.

    Raises:
        FileNotFoundError: no `diffusers` folder holds it.
    """
    folder = checkpoint_folders().get(str(name).replace("\\", "/"))
    if folder is None:
        roots = ", ".join(folder_paths.get_folder_paths("diffusers"))
        raise FileNotFoundError(f"Checkpoint folder '{name}' was not found in {roots}. Choose one that the node lists.")
    return folder


def explain_missing(family: Family, name: str | None) -> bool | str:
    """True when the checkpoint exists, else a message that says where to get it and where to put it.

    Also True for None, which ComfyUI says in place of a name that comes over a wire: loading then tells.
    """
    if name is None or str(name).replace("\\", "/") in checkpoint_folders():
        return True
    roots = " or ".join(folder_paths.get_folder_paths("diffusers"))
    return (
        f"Checkpoint folder '{name}' was not found. Download {family.title}, published as {family.repository}, "
        f"with all its sub-folders into a folder in {roots}, then refresh the node list (R)."
    )


def fingerprint_checkpoint(name: str | None) -> str:
    """Changes when a file of the checkpoint changes; see `fingerprint.of_choice`."""
    return fingerprint.of_choice(name, checkpoint_folders, lambda each: fingerprint.of_folder(find_checkpoint(each)))


def check_family(folder: Path, family: Family) -> None:
    """Raise ValueError unless the folder's network configuration names the family's network."""
    config = folder / family.component / "config.json"
    found = read_config(config).get("_class_name")
    _compare_with_index(folder, family, found)
    if found != family.network_class:
        raise ValueError(
            f"{config} describes a {found or 'network without _class_name'}, but {family.title} needs "
            f"{family.network_class}. "
            f"Choose a folder of that family (published as {family.repository})."
        )


def _compare_with_index(folder: Path, family: Family, found: str | None) -> None:
    """Log where model_index.json names another network than the network's own configuration, which decides."""
    entry = read_config_or(folder / "model_index.json", {}).get(family.component)
    named = entry[-1] if isinstance(entry, list) and entry else None
    if named not in (None, found):
        logging.info(
            "%s: model_index.json names a %s for %s, whose own configuration says %s: that is what is loaded.",
            folder,
            named,
            family.component,
            found,
        )
