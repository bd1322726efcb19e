"""Checkpoints of a run: written beside their final name, renamed when complete, so that the last good one survives."""

import json
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

STATE = "training_state"
PROGRESS = "progress.json"
UNFINISHED = ".unfinished"
NAME = re.compile(r"step-\d{8}")


@dataclass(frozen=True)
class Traits:
    """What a run has to have in common with the checkpoint that it continues from.

    Args:
        trainer: its name.
        ema: whether there is a moving average.
        parameters: number of values of the network.
        trained_parameters: how many of them are trained.
    """

    trainer: str
    ema: bool
    parameters: int
    trained_parameters: int


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Args:
        step: changes of the weights.
        samples: clips seen by all processes.
        traits: of the run.
    """

    step: int
    samples: int
    traits: Traits


def folder_name(step: int) -> str:
    """Name of a step's checkpoint."""
    return f"step-{step:08}"


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first; nothing when there is no folder."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if NAME.fullmatch(path.name) and (path / PROGRESS).is_file())


def read_progress(checkpoint: Path, traits: Traits) -> Progress:
    """How far the run was when a checkpoint was written.

    Raises:
        ValueError: the checkpoint is of a run with other traits, or its record cannot be read.
    """
    try:
        content = json.loads((checkpoint / PROGRESS).read_text(encoding="utf-8"))
        progress = Progress(int(content["step"]), int(content["samples"]), Traits(**content["traits"]))
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(damaged(checkpoint, error)) from error
    for name, here in asdict(traits).items():
        there = getattr(progress.traits, name)
        if there != here:
            raise ValueError(
                f"{checkpoint} was written by a run with {name} {there}, this one has {here}. Change the settings "
                "back, or choose another output folder; its weights can be the pretrained ones of a new run."
            )
    return progress


def damaged(checkpoint: Path, error: Exception) -> str:
    """The message of a checkpoint that cannot be read."""
    return f"{checkpoint} is damaged ({error}). Delete this folder: the run goes on from the checkpoint before."


def unfinished(folder: Path, step: int) -> Path:
    """Where a step's checkpoint lies until it is complete."""
    return folder / (folder_name(step) + UNFINISHED)


def begin(folder: Path, step: int) -> None:
    """Make the folder that a checkpoint is written into; what a killed run left half written or deleted goes."""
    folder.mkdir(parents=True, exist_ok=True)
    finished = complete(folder)
    for left in folder.iterdir():
        if NAME.fullmatch(left.name.removesuffix(UNFINISHED)) and left not in finished:
            shutil.rmtree(left)
    unfinished(folder, step).mkdir()


def finish(written: Path, progress: Progress, keep: int) -> Path:
    """Give a written checkpoint its name once all of it is on the disk, then delete the oldest ones.

    Args:
        written: the folder of `unfinished`.
        progress: what the checkpoint is.
        keep: how many checkpoints stay.
    """
    folder = written.parent
    (written / PROGRESS).write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
    _each_on_disk(written)
    finished = written.rename(folder / folder_name(progress.step))
    _on_disk(folder)
    for old in complete(folder)[:-keep]:
        # Without its record it is no checkpoint any more, should deleting the rest be interrupted.
        (old / PROGRESS).unlink()
        shutil.rmtree(old)
    return finished


def link_or_copy(source: Path, target: Path) -> None:
    """A file, or all files of a folder, at another place: as hard links where the file system has them."""
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for child in source.iterdir():
            link_or_copy(child, target / child.name)
        return
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def _each_on_disk(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _on_disk(path)


def _on_disk(path: Path) -> None:
    """Wait until the system has written a file or a folder. (Windows does so by itself, and opens no folders.)"""
    if os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
