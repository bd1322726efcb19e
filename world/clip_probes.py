"""Read back from the frames of a clip what moves in it, and how much it flickers."""

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from .probes import GROUNDS, SKINS, Reading, Seen, label, read_picture
from .scene import Person

LEAST_WALK = 0.1  # share of the width
LEAST_JUMP = 0.05  # share of the height
LEAST_WAVE = 0.4  # share of the frames with a hand beside the head
LEAST_PAN, LEAST_ZOOM = 0.08, 1.12
GRID = 48  # pixels across, on which backgrounds are compared
ZOOMS = tuple(1.5 ** (step / 12) for step in range(-8, 9))
PLACE_NUMBERS = [number for numbers in GROUNDS.values() for number in numbers]


@dataclass(frozen=True)
class Flow:
    """How the background moves from the first frame to the last: shares of the width to the right, and a zoom."""

    shift: float
    zoom: float

    @property
    def camera(self) -> str:
        """The camera that moves a still world like this; one of `scene.CAMERAS`."""
        if self.zoom > LEAST_ZOOM or self.zoom < 1 / LEAST_ZOOM:
            return "zoom in" if self.zoom > 1 else "zoom out"
        if abs(self.shift) < LEAST_PAN:
            return "still"
        return "pan left" if self.shift > 0 else "pan right"


@dataclass(frozen=True)
class ClipReading:
    """A clip as a probe sees it.

    Args:
        frames: every frame.
        person: the first person as most frames show it; None without one.
        motion: one of `scene.MOTIONS`, None without a person.
        travel: how far the person moves to the right through the world, in widths.
        flow: of the background.
    """

    frames: tuple[Reading, ...]
    person: Seen | None
    motion: str | None
    travel: float
    flow: Flow


def read_clip(frames: np.ndarray) -> ClipReading:
    """What a clip (F, H, W, 3), 0..255, shows."""
    readings = tuple(read_picture(frame) for frame in frames)
    flow = clip_flow(frames)
    tracked = [(index, reading.people[0]) for index, reading in enumerate(readings) if reading.people]
    if len(tracked) < 2:
        return ClipReading(readings, tracked[0][1] if tracked else None, None, 0.0, flow)
    seen = [person for _, person in tracked]
    times = np.array([index / max(len(frames) - 1, 1) for index, _ in tracked])
    travel = float(np.polyfit(times, [person.x for person in seen], 1)[0]) - flow.shift
    heights = [person.y for person in seen]
    motion = "stand"
    if abs(travel) > LEAST_WALK and flow.camera in ("still", "pan left", "pan right"):
        motion = "walk right" if travel > 0 else "walk left"
    elif flow.camera == "still" and max(heights) - min(heights) > LEAST_JUMP:
        motion = "jump"
    elif _waves(frames, readings):
        motion = "wave"
    return ClipReading(readings, _typical(seen), motion, travel, flow)


def _typical(seen: list[Seen]) -> Seen:
    """Each attribute as most frames show it, at the place of the middle frame."""
    middle = seen[len(seen) // 2]
    most = {
        name: Counter(getattr(person, name) for person in seen).most_common(1)[0][0]
        for name in ("hair", "shirt", "skin", "accessory")
    }
    return Seen(**most, x=middle.x, y=middle.y, tall=middle.tall)


def _waves(frames: np.ndarray, readings: tuple[Reading, ...]) -> bool:
    """Whether a hand is beside the head, to its right, in most frames."""
    raised = 0
    for frame, reading in zip(frames, readings):
        if not reading.people or reading.people[0].skin is None:
            continue
        person, labels = reading.people[0], label(frame)
        height, width = labels.shape
        rows, columns = np.indices(labels.shape)
        tall, x, y = person.tall * height, person.x * width, person.y * height
        beside = (columns > x + 0.17 * tall) & (columns < x + 0.55 * tall) & (rows < y - 0.17 * tall)
        hand = beside & (rows > y - 0.6 * tall) & (labels == SKINS[person.skin])
        raised += bool(hand.sum() > 0.25 * math.pi * (0.05 * tall) ** 2)
    return raised > LEAST_WAVE * len(frames)


def clip_flow(frames: np.ndarray, parts: int = 3) -> Flow:
    """How the background moves over a clip (F, H, W, 3), followed over a few frames on the way."""
    stops = sorted({round(part * (len(frames) - 1) / parts) for part in range(parts + 1)})
    flows = [background_flow(frames[start], frames[end]) for start, end in zip(stops, stops[1:])]
    return Flow(sum(flow.shift for flow in flows), math.prod(flow.zoom for flow in flows))


def background_flow(first: np.ndarray, last: np.ndarray) -> Flow:
    """The shift and the zoom that take the background of one frame nearest to that of another (H, W, 3)."""
    before, after = (_small_labels(frame) for frame in (first, last))
    height, width = before.shape
    rows, columns = np.indices(before.shape)
    known = np.isin(after, PLACE_NUMBERS)
    best, found = -1.0, Flow(0.0, 1.0)
    for zoom in ZOOMS:
        # a zoom of this world keeps a point a little below the middle, see `drawing.camera_at`
        centre = height / 2 + (0.0 if zoom == 1 else 0.12 * height * (1 if zoom > 1 else -1) * abs(math.log(zoom)))
        source_rows = np.rint((rows - height / 2) / zoom + centre).astype(int)
        inside_rows = (source_rows >= 0) & (source_rows < height)
        shifts = range(-width // 3, width // 3 + 1) if zoom == 1 else (0,)
        for shift in shifts:
            source = np.rint((columns - shift - width / 2) / zoom + width / 2).astype(int)
            usable = known & inside_rows & (source >= 0) & (source < width)
            if usable.sum() < 0.3 * known.size:
                continue
            taken = before[source_rows.clip(0, height - 1), source.clip(0, width - 1)]
            usable &= np.isin(taken, PLACE_NUMBERS)
            score = (taken == after)[usable].mean() - 0.0005 * abs(shift) if usable.any() else -1.0
            if score > best + 1e-6:
                best, found = score, Flow(shift / width, zoom)
    return found


def _small_labels(frame: np.ndarray) -> np.ndarray:
    """Labels of a frame on a grid `GRID` pixels wide."""
    height, width = frame.shape[:2]
    rows = (np.arange(round(GRID * height / width)) + 0.5) * width / GRID
    columns = (np.arange(GRID) + 0.5) * width / GRID
    return label(frame[rows.astype(int).clip(0, height - 1)][:, columns.astype(int)])


def unsteadiness(frames: np.ndarray, reach: int = 2) -> float:
    """How much neighbouring frames differ where they are aligned, 0..255.

    Args:
        frames: (F, H, W, 3).
        reach: each pixel may have moved by so many pixels; the smallest difference counts.
    """
    frames = frames.astype(np.float32)
    total = []
    for before, after in zip(frames, frames[1:]):
        inner = after[reach : after.shape[0] - reach, reach : after.shape[1] - reach]
        smallest = np.full(inner.shape[:2], np.inf, dtype=np.float32)
        for down in range(2 * reach + 1):
            for across in range(2 * reach + 1):
                moved = before[down : down + inner.shape[0], across : across + inner.shape[1]]
                smallest = np.minimum(smallest, np.abs(inner - moved).mean(axis=-1))
        total.append(smallest.mean())
    return float(np.mean(total)) if total else 0.0


def likeness(first: Seen, second: Seen) -> float:
    """Share of hair, shirt, skin and accessory that two people have in common, 0..1."""
    names = ("hair", "shirt", "skin", "accessory")
    return sum(getattr(first, name) == getattr(second, name) for name in names) / len(names)


def who(seen: Seen, cast: tuple[Person, ...]) -> int:
    """Index of the person of a cast that somebody looks most like."""
    return max(range(len(cast)), key=lambda index: sum(seen.agrees(cast[index])))
