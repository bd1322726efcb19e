"""A report on a checkpoint: what it is, what is wrong with it, what it takes to load it."""

import logging
from collections import Counter
from pathlib import Path

import torch

from . import fingerprint, folders, single_file
from .assembly import build_network, read_scheduler
from .checkpoint import load_folder_clip, load_folder_vae
from .families import FAMILIES, Family
from .network import build_on_meta, compare
from .state_dicts import unwrap
from .vision import load_vision_tower
from .weights import find_weights, read_file, read_weights

FILE_PREFIX = "diffusion_models/"
COMPONENTS = {
    "text_encoder": load_folder_clip,
    "image_encoder": lambda family, folder: load_vision_tower(folder),
    "vae": load_folder_vae,
}


def list_sources() -> list[str]:
    """Checkpoint folders, then files of `diffusion_models` with their folder's name before them."""
    return [*sorted(folders.checkpoint_folders()), *(FILE_PREFIX + name for name in single_file.list_files())]


def find_source(name: str) -> Path:
    """The folder or file behind a listed name.

    Raises:
        FileNotFoundError: it does not exist any more.
    """
    if name in folders.checkpoint_folders() or not name.startswith(FILE_PREFIX):
        return folders.find_checkpoint(name)
    return single_file.find_file(name.removeprefix(FILE_PREFIX))


def fingerprint_source(name: str | None) -> str:
    """Changes with the folder or file; see `fingerprint.of_choice`."""
    return fingerprint.of_choice(name, list_sources, lambda each: fingerprint.of_folder(find_source(each)))


def report(name: str) -> str:
    """The report on a listed folder or file. Damage is part of the report, not an error.

    Raises:
        FileNotFoundError: it does not exist any more.
    """
    source = find_source(name)
    lines = [f"Checkpoint: {source}"]
    with _Remarks() as remarks:
        try:
            lines += _report_folder(source) if source.is_dir() else _report_file(source)
        except (FileNotFoundError, ValueError) as error:
            lines.append(f"Cannot be loaded: {error}")
    return "\n".join(lines + [f"Note: {remark}" for remark in dict.fromkeys(remarks.lines)])


class _Remarks(logging.Handler):
    """What the loaders say in the log while they read a checkpoint, so that a report says the same."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if Path(record.pathname).parent == Path(__file__).parent:
            self.lines.append(record.getMessage())

    def __enter__(self) -> "_Remarks":
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *_) -> None:
        logging.getLogger().removeHandler(self)


def _report_folder(folder: Path) -> list[str]:
    found = folders.network_class(folder)
    family = next((family for family in FAMILIES.values() if family.network_class == found), None)
    if family is None:
        description = found or "no readable unet or transformer configuration"
        return [f"Family: none of this pack's ({description})", "To load it: use the node made for this model."]
    files = find_weights(folder / family.component, "diffusion_pytorch_model")
    folders.check_family(folder, family)
    network = build_network(family, folder / family.component)
    read_scheduler(family, folder)
    lines = [f"Family: {family.title}", f"Network files: {', '.join(file.name for file in files)}"]
    lines += _report_state(family.parts.prepare(read_weights(files)), network, family.loader)
    return lines + [_report_component(family, folder, name) for name in COMPONENTS if (folder / name).exists()]


def _report_component(family: Family, folder: Path, name: str) -> str:
    try:
        component = COMPONENTS[name](family, folder)
    except (FileNotFoundError, ValueError) as error:
        return f"{name}: cannot be loaded: {error}"
    return f"{name}: {_count(component.get_sd())}"


def _report_file(path: Path) -> list[str]:
    state = single_file.network_keys(unwrap(path, read_file(path)), str(path))
    if single_file.detect_family(state) is None:
        keys = ", ".join(sorted(state)[:3])
        return [
            f"Family: none of this pack's (keys such as {keys})",
            _count(state),
            "To load it: use the node made for this model.",
        ]
    file = single_file.read_network(path)
    network = build_on_meta(file.family.network, file.config, str(path))
    return [f"Family: {file.family.title}", *_report_state(file.state, network, "Load Video Diffusion Model")]


def _report_state(state: dict[str, torch.Tensor], network: torch.nn.Module, loader: str) -> list[str]:
    difference = compare(state, network)
    lines = [
        f"Network: {_count(state)}",
        f"Missing keys: {_keys(difference.missing)}",
        f"Unexpected keys: {_keys(difference.unexpected)}",
        "Misshapen keys: "
        f"{_keys([f'{key} {found} instead of {expected}' for key, found, expected in difference.misshapen])}",
    ]
    advice = (
        f"use {loader}."
        if not difference
        else "get the complete published file; the keys above do not fit the configuration."
    )
    return [*lines, f"To load it: {advice}"]


def _count(state: dict[str, torch.Tensor]) -> str:
    parameters = Counter()
    for tensor in state.values():
        parameters[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    types = ", ".join(f"{dtype} {count:,}" for dtype, count in parameters.most_common())
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    return f"{sum(parameters.values()):,} parameters ({types}), {size / 2**30:.2f} GiB"


def _keys(keys: list[str], shown: int = 20) -> str:
    more = f", and {len(keys) - shown} more" if len(keys) > shown else ""
    return f"{len(keys)} ({', '.join(keys[:shown])}{more})" if keys else "none"
