"""What tells ComfyUI's cache that a checkpoint on disk is another one now."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from .linked_folders import walk


def of_file(path: Path) -> str:
    """Changes with the size or the modification time of a file."""
    stat = path.stat()
    return f"{stat.st_size}:{stat.st_mtime_ns}"


def of_folder(path: Path) -> str:
    """Changes when any file below a folder (or the file itself) is added, removed or rewritten."""
    files = [path]
    if not path.is_file():
        inside = (Path(directory) / name for directory, _, names in walk(path) for name in names)
        files = sorted(file for file in inside if file.is_file())
    return hashlib.sha256("\n".join(f"{file} {of_file(file)}" for file in files).encode()).hexdigest()


def of_choice(name: str | None, names: Callable[[], Iterable[str]], of: Callable[[str], str]) -> str:
    """The fingerprint of a chosen name; of all names together where the choice comes over a wire.

    ComfyUI asks before anything runs, and says None for what comes over a wire.
    """
    return of(name) if name is not None else "\n".join(f"{each} {of(each)}" for each in names())
