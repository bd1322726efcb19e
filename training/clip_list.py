"""Annotated video files: the lines of annotation files, read when a clip is asked for.

Annotations are JSON lines in one of two forms: {"text", "file"} (as WebVid), or {"id", "file"} with the texts in a
second file of {"id", "text"} (as Pexels). Other keys are ignored, and so are blank lines.
"""

import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

_LINE = np.dtype([("start", np.int64), ("number", np.int64)])
_CAPTION = np.dtype([("digest", np.int64), *_LINE.descr])


class UnusableClip(ValueError):
    """A clip that cannot be trained on; other clips can.

    Args:
        where: the line that names it, "annotations.jsonl:17", or the path of a video file.
        reason: what is wrong with it.
    """

    def __init__(self, where: str, reason: str):
        super().__init__(where, reason)
        self.where, self.reason = where, reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Source:
    """Where clips come from.

    Args:
        annotations: JSON lines {"text", "file"}, or {"id", "file"} when there is a file of captions.
        folder: of the video files; "file" is relative to it.
        captions: JSON lines {"id", "text"}. The first of several with the same id counts.
    """

    annotations: Path
    folder: Path
    captions: Path | None = None


@dataclass(frozen=True)
class Clip:
    """A video file and its text; `where` is the line that says so."""

    path: Path
    text: str
    where: str


class ClipList(Sequence):
    """The clips of several sources, one source after the other.

    Holds numbers only, a few arrays, and opens the files anew for each clip: it may be pickled, and used by many
    processes at once.

    Raises:
        FileNotFoundError: an annotation file, folder or file of captions does not exist.
        ValueError: no sources, or a file without a line.
    """

    def __init__(self, sources: Sequence[Source]):
        if not sources:
            raise ValueError("There is nothing to train on: give at least one annotation file and its video folder.")
        self._sources = tuple(_SourceClips(source) for source in sources)
        self._ends = np.cumsum([len(source) for source in self._sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Clip:
        """The clip with this number.

        Raises:
            IndexError: there are fewer clips.
            UnusableClip: a malformed line, a missing key, an id without a caption, a text with half of a character, or
                a file that is not there.
        """
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"Clip {index} of {len(self)}.")
        index %= len(self)
        source = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[source].clip(index - int(self._ends[source]) + len(self._sources[source]))


class _SourceClips:
    def __init__(self, source: Source):
        _require_file(source.annotations, "annotation file")
        if not source.folder.is_dir():
            raise FileNotFoundError(
                f"The video folder {source.folder} of {source.annotations} does not exist. Correct its path."
            )
        self._source = source
        self._lines = np.fromiter(((start, number) for start, number, _ in _lines(source.annotations)), _LINE)
        if not len(self._lines):
            raise ValueError(
                f"The annotation file {source.annotations} names no clips: it should have a line "
                '{"text": ..., "file": ...} for each.'
            )
        self._captions = _Captions(source.captions) if source.captions else None

    def __len__(self) -> int:
        return len(self._lines)

    def clip(self, index: int) -> Clip:
        where, row = _read_row(self._source.annotations, self._lines[index])
        path = self._find(_value(where, row, "file", str), where)
        if self._captions:
            text = self._captions.text(str(_value(where, row, "id", (int, str))), where)
        else:
            text = _value(where, row, "text", str)
        _require_whole_characters(text, where)
        return Clip(path, text, where)

    def _find(self, file: str, where: str) -> Path:
        """The video file. Dumps with absolute paths are searched by the whole path, and as published by its end."""
        path = PurePath(file)
        names = path.parts[1:] if path.anchor else path.parts
        if ".." in names:
            raise UnusableClip(where, f"{file!r} leads out of the video folder; name a file inside it")
        candidates = [self._source.folder.joinpath(*names)]
        if path.anchor:
            candidates.append(self._source.folder / path.name)
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        raise UnusableClip(where, f"there is no file {file!r} in {self._source.folder}")


class _Captions:
    """Texts by id, found through sorted 64-bit digests of the ids."""

    def __init__(self, path: Path):
        _require_file(path, "file of captions")
        self._path = path
        entries = np.fromiter(self._entries(), _CAPTION)
        if not len(entries):
            raise ValueError(
                f'The file of captions {path} should have lines {{"id": ..., "text": ...}}; none has an id.'
            )
        self._entries_by_digest = entries[np.argsort(entries["digest"], kind="stable")]

    def text(self, identity: str, where: str) -> str:
        digest = _digest(identity)
        first, last = (np.searchsorted(self._entries_by_digest["digest"], digest, side) for side in ("left", "right"))
        for entry in self._entries_by_digest[first:last]:
            caption_where, row = _read_row(self._path, entry)
            # Different ids may share a digest.
            if str(row["id"]) == identity:
                return _value(caption_where, row, "text", str)
        raise UnusableClip(where, f"{self._path} has no caption for the id {identity!r}")

    def _entries(self) -> Iterator[tuple[int, int, int]]:
        """Of the lines that have an id; a clip that needs another line has no caption and is reported by its own."""
        for start, number, line in _lines(self._path):
            try:
                identity = _value("", _parse("", line), "id", (int, str))
            except UnusableClip:
                continue
            yield _digest(str(identity)), start, number


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Offset, number from 1, and content of the lines that are not blank."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield start, number, line
            start += len(line)


def _read_row(path: Path, entry: np.void) -> tuple[str, dict]:
    where = f"{path}:{entry['number']}"
    with path.open("rb") as file:
        file.seek(int(entry["start"]))
        return where, _parse(where, file.readline())


def _parse(where: str, line: bytes) -> dict:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise UnusableClip(where, f"the line is not JSON ({problem})") from problem
    if not isinstance(row, dict):
        raise UnusableClip(where, f"the line should be a JSON object, found {type(row).__name__}")
    return row


def _value(where: str, row: dict, key: str, kind: type | tuple[type, ...]) -> int | str:
    if key not in row:
        raise UnusableClip(where, f'the line has no "{key}"; it has {", ".join(sorted(row)) or "no keys"}')
    if not isinstance(row[key], kind) or isinstance(row[key], bool):
        raise UnusableClip(where, f'"{key}" should be text, found {row[key]!r}')
    return row[key]


def _require_whole_characters(text: str, where: str) -> None:
    """Raise UnusableClip for a text with half of a surrogate pair, such as a cut emoji, which tokenizers refuse."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        raise UnusableClip(
            where, f"the text has half of a character at position {problem.start} ({text[problem.start]!r})"
        ) from problem


def _digest(identity: str) -> int:
    content = identity.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)


def _require_file(path: Path, kind: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"The {kind} {path} does not exist. Correct its path.")
