"""Places where the host waits for the card, which stops it from queuing further work.

The counter is a state of the process: on the card there is one queue.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

REPOSITORY = Path(__file__).resolve().parents[2]
PACK = ("faces", "loaders", "models", "nodes", "patches", "samplers", "story")
OURS = tuple(str(REPOSITORY / folder) for folder in PACK)
Result = TypeVar("Result")

# (kind of wait, place in the pack and, after "via", in the library it called) -> how often.
_found: Counter[tuple[str, str]] = Counter()
_listening = 0
# Storages in host memory that a copy from the card is still filling.
_filling: set[int] = set()


def note(kind: str) -> None:
    """The host waits, so that all work queued before has ended."""
    _filling.clear()
    if _listening:
        _found[kind, _place()] += 1


def fills(storage: int) -> None:
    """A copy from the card to this storage in pinned host memory is queued; its values are there after a wait."""
    _filling.add(storage)


def is_filling(storage: int) -> bool:
    """Whether a storage of the host is read before its values are there."""
    return storage in _filling


@contextmanager
def counted() -> Iterator[Counter]:
    """Count the waits inside; the counter is complete when the block is left."""
    global _listening
    before, result = Counter(_found), Counter()
    _listening += 1
    try:
        yield result
    finally:
        _listening -= 1
        result.update(_found - before)


def per_step(run: Callable[[Callable], Result]) -> tuple[Counter, Result]:
    """Waits of the last step of a sampling run, when everything has been loaded, and what the run returns.

    Args:
        run: samples at least two steps and calls its argument after each, as ComfyUI's samplers call `callback`.
    """
    marks = []
    with counted():
        result = run(lambda *_: marks.append(Counter(_found)))
    if len(marks) < 2:
        raise ValueError(f"The run called back {len(marks)} times, expected at least two steps.")
    return marks[-1] - marks[-2], result


def report(found: Counter) -> str:
    """One line per place, the most frequent first."""
    return "\n".join(f"{count:6d}  {kind:24s} {place}" for (kind, place), count in found.most_common()) or "none"


def _place() -> str:
    """Where in the pack the wait comes from, and where in the library that it called."""
    places, ours, frame = [], None, sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if not _is_machinery(file):
            place = f"{'/'.join(Path(file).parts[-2:])}:{frame.f_lineno}"
            places.append(place)
            if file.startswith(OURS):
                ours = place
                break
        frame = frame.f_back
    last = places[0] if places else "?"
    return last if ours in (None, last) else f"{ours} via {last}"


def _is_machinery(file: str) -> bool:
    return "/torch/" in file or file.startswith(str(Path(__file__).parent))
