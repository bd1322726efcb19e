"""Character banks on disk: safetensors with the run they were made in."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import comfy.utils
import folder_paths
import torch

from ..patches.character_bank import CharacterBank, Evaluation, Origin, Slot
from ..patches.token_sharing import Layer, Sharing
from .described_file import DescribedFile
from .listed_files import ListedFiles
from .weights import read_file

FOLDER = "character_banks"
FILES = ListedFiles(FOLDER, "Character bank", "Save one with Save Character Bank, or put the file into {folders}")
FORMAT = DescribedFile(
    "consistent_video.character_bank",
    1,
    "character bank",
    "Save Character Bank",
    "draw the reference panels again and save their bank",
)


def register_folder() -> None:
    """Let ComfyUI list banks of `models/character_banks` and of the output folder of the same name."""
    for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(FOLDER, str(Path(parent) / FOLDER))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


def save_bank(bank: CharacterBank, path: Path) -> None:
    """Write a bank.

    Raises:
        ValueError: a bank that holds nothing of anybody.
    """
    if not any(bank.characters.values()):
        raise ValueError("The character bank is empty. Draw a story with reference panels first.")
    names = list(bank.characters)
    state = {
        f"{names.index(name)}/{_slot_key(slot)}": tensor
        for name, tokens in bank.characters.items()
        for slot, tensor in tokens.items()
    }
    metadata = FORMAT.metadata(characters=names, origin=dataclasses.asdict(bank.origin))
    comfy.utils.save_torch_file(state, str(path), metadata=metadata)


def load_bank(path: Path) -> CharacterBank:
    """Read a bank; its tensors stay in the file until they are needed.

    Raises:
        ValueError: the file is damaged, is no character bank, or has another version of the format.
    """
    metadata = FORMAT.read(path)
    try:
        names = [str(name) for name in metadata["characters"]]
        origin = _read_origin(metadata["origin"])
        characters = {name: {} for name in names}
        for key, tensor in read_file(path).items():
            number, _, slot = key.partition("/")
            characters[dict(enumerate(names))[int(number)]][_read_slot(slot)] = _matrix(tensor)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(FORMAT.unreadable(path, error)) from error
    empty = [name for name, tokens in characters.items() if not tokens]
    if empty or not characters:
        raise ValueError(f"{path} holds nothing of {', '.join(empty) or 'anyone'}. Save the bank again.")
    return CharacterBank(origin, characters)


def _slot_key(slot: Slot) -> str:
    return ".".join(map(str, (*slot.evaluation, *slot.layer)))


def _read_slot(key: str) -> Slot:
    kind, entry, step, visit, part, block, index = key.split(".")
    return Slot(Evaluation(int(kind), int(entry), int(step), int(visit)), Layer(part, int(block), int(index)))


def _read_origin(described: Mapping) -> Origin:
    fields = {**described, "sigmas": tuple(map(float, described["sigmas"])), "sharing": Sharing(**described["sharing"])}
    return Origin(**fields)


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.ndim != 2:
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)}, expected (tokens, channels)")
    return tensor
