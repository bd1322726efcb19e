"""Read back from the pixels of a picture who and what is in it.

Each pixel takes the name of the nearest colour of the world; a person is where a shirt is, and everything else about
the person is looked for at its place around the shirt. Nothing is learned, so that a probe means the same for drawn
pictures and for those of a network.
"""

import math
from dataclasses import dataclass

import numpy as np

from .palette import HAIR, PLACES, SHIRT, SKIN, all_colors, nearest
from .scene import Person

NAMES = list(all_colors())
SHIRTS = {color: NAMES.index(f"shirt {color}") for color in SHIRT}
HAIRS = {color: NAMES.index(f"hair {color}") for color in HAIR}
SKINS = {color: NAMES.index(f"skin {color}") for color in SKIN}
GROUNDS = {place: [NAMES.index(f"place {place} {part}") for part in parts] for place, parts in PLACES.items()}
HAT, SCARF, INK = NAMES.index("accessory hat"), NAMES.index("accessory scarf"), HAIRS["black"]

SMALLEST_SHIRT = 0.008  # share of a picture that a shirt has at least
SMALLEST_SHARE = 0.3  # of the largest shirt, for a second person
SHIRT_AREA = 0.168  # of a person 1 high
HEAD_RADIUS = 0.155
FACE_SHARE = 0.25  # of the face's disc that is skin, at least
GLASSES_SHARE = 0.16  # of the head's radius squared, of ink inside a face
MOST_PEOPLE = 2


@dataclass(frozen=True)
class Seen:
    """A person as a probe sees it.

    Args:
        hair, shirt, skin, accessory: as in `scene.Person`; None where there is nothing to be seen.
        x, y: centre of the shirt, 0..1 of the picture's width and height.
        tall: height of the whole person, in heights of the picture.
    """

    hair: str | None
    shirt: str
    skin: str | None
    accessory: str
    x: float
    y: float
    tall: float

    def agrees(self, person: Person, names: tuple[str, ...] = ("hair", "shirt", "skin", "accessory")) -> list[bool]:
        """Whether each of the named attributes is that of a person."""
        return [getattr(self, name) == getattr(person, name) for name in names]


@dataclass(frozen=True)
class Reading:
    """A picture as a probe sees it: the place, and the people from left to right."""

    place: str
    people: tuple[Seen, ...]


def label(picture: np.ndarray) -> np.ndarray:
    """Number in `NAMES` of the nearest colour of every pixel.

    Args:
        picture: (H, W, 3), 0..255.
    """
    return nearest(picture, all_colors())


def read_picture(picture: np.ndarray) -> Reading:
    """What a picture (H, W, 3), 0..255, shows."""
    labels = label(picture)
    people = [_read_person(labels, shirt) for shirt in _shirts(labels)]
    return Reading(read_place(labels), tuple(sorted(people, key=lambda seen: seen.x)))


def read_place(labels: np.ndarray) -> str:
    """The place whose colours most pixels have, of labels (H, W)."""
    counts = {place: np.isin(labels, numbers).sum() for place, numbers in GROUNDS.items()}
    return max(counts, key=counts.get)


def _shirts(labels: np.ndarray) -> list[str]:
    """Colours of the shirts in a picture, the largest first."""
    counts = {color: int((labels == number).sum()) for color, number in SHIRTS.items()}
    ordered = sorted(counts, key=counts.get, reverse=True)[:MOST_PEOPLE]
    least = max(SMALLEST_SHIRT * labels.size, SMALLEST_SHARE * counts[ordered[0]])
    return [color for color in ordered if counts[color] >= least]


def _read_person(labels: np.ndarray, shirt: str) -> Seen:
    height, width = labels.shape
    rows, columns = np.nonzero(labels == SHIRTS[shirt])
    x, y = float(np.median(columns)), float(np.median(rows))
    tall = math.sqrt(len(rows) / SHIRT_AREA)
    face = _find_face(labels, x, y, tall)
    if face is None:
        return Seen(None, shirt, None, "none", (x + 0.5) / width, (y + 0.5) / height, tall / height)
    skin, face_x, face_y, radius = face
    hair = _most(labels, HAIRS, _ring(labels, face_x, face_y - 0.28 * radius, 0.95 * radius, 1.2 * radius, radius))
    accessory = _accessory(labels, face_x, face_y, radius)
    return Seen(hair, shirt, skin, accessory, (x + 0.5) / width, (y + 0.5) / height, tall / height)


def _find_face(labels: np.ndarray, x: float, y: float, tall: float) -> tuple[str, float, float, float] | None:
    """Skin colour, centre (x, y) and the head's radius in pixels of the face above a shirt; None without one."""
    rows, columns = np.indices(labels.shape)
    above = (rows < y - 0.05 * tall) & (rows > y - 0.75 * tall) & (np.abs(columns - x) < 0.2 * tall)
    skin = _most(labels, SKINS, above)
    if skin is None:
        return None
    found = above & (labels == SKINS[skin])
    count = int(found.sum())
    # a face is a disc of 0.86 radii, of which eyes and mouth, glasses too, are not skin
    radius = min(max(math.sqrt(count / math.pi) / 0.84, 0.6 * HEAD_RADIUS * tall), 2.0 * HEAD_RADIUS * tall)
    if count < FACE_SHARE * math.pi * (HEAD_RADIUS * tall) ** 2 * 0.5:
        return None
    return skin, float(np.median(columns[found])), float(np.median(rows[found])), radius


def _most(labels: np.ndarray, choices: dict[str, int], where: np.ndarray) -> str | None:
    """The choice that most pixels of a region have."""
    counts = {name: int((where & (labels == number)).sum()) for name, number in choices.items()}
    best = max(counts, key=counts.get)
    return best if counts[best] else None


def _ring(labels: np.ndarray, x: float, y: float, inner: float, outer: float, radius: float) -> np.ndarray:
    """The upper part of a ring around a point."""
    rows, columns = np.indices(labels.shape)
    distance = np.hypot(columns - x, rows - y)
    return (distance > inner) & (distance < outer) & (rows < y + 0.5 * radius)


def _accessory(labels: np.ndarray, x: float, y: float, radius: float) -> str:
    rows, columns = np.indices(labels.shape)
    near = np.abs(columns - x) < 1.5 * radius
    square = radius**2
    if (near & (rows < y) & (rows > y - 2.2 * radius) & (labels == HAT)).sum() > 0.5 * square:
        return "hat"
    if (near & (rows > y) & (rows < y + 3 * radius) & (labels == SCARF)).sum() > 0.3 * square:
        return "scarf"
    inside = np.hypot(columns - x, rows - y + 0.1 * radius) < 0.72 * radius
    return "glasses" if (inside & (labels == INK)).sum() > GLASSES_SHARE * square else "none"
