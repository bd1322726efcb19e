"""Folders as users link them: followed, but not in circles; text files as Windows writes them."""

import codecs
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def walk(root: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, sorted, through links, except those that lead back to a folder that they lie in."""
    for directory, subdirectories, files in os.walk(root, followlinks=True):
        subdirectories[:] = sorted(name for name in subdirectories if not _leads_back(directory, name))
        yield directory, subdirectories, sorted(files)


def _leads_back(directory: str, name: str) -> bool:
    target, place = (os.path.realpath(path) for path in (os.path.join(directory, name), directory))
    return place == target or place.startswith(os.path.join(target, ""))


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in what a byte order mark says.

    Raises:
        UnicodeDecodeError: it is neither.
    """
    content = path.read_bytes()
    return content.decode(_encoding(content))


def _encoding(content: bytes) -> str:
    return next((encoding for mark, encoding in MARKS.items() if content.startswith(mark)), "utf-8")


@contextmanager
def without_marks(folder: Path) -> Iterator[Path]:
    """The folder, or a copy for the time being if texts in it have byte order marks, which other libraries refuse.

    Args:
        folder: of small files; may be missing.
    """
    files = [path for path in folder.glob("*") if path.suffix in (".json", ".txt")]
    marked = [path for path in files if _encoding(path.read_bytes()[:4]) != "utf-8"]
    if not marked:
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / folder.name
        shutil.copytree(folder, copy)
        for path in marked:
            (copy / path.name).write_text(read_text(path), encoding="utf-8")
        yield copy
