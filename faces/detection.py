"""What every face detector returns, how its candidates are thinned out, and which face is meant.

Boxes are x1, y1, x2, y2 in pixels of the picture.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

MIN_SCORE = 0.5
MAX_OVERLAP = 0.4
ADVICE = (
    "Use a sharp, upright picture in which one face, seen from the front, takes at least a fifth of the height and is "
    "not cut off; scale up small pictures, leave a margin around close-ups."
)


@dataclass(frozen=True, eq=False)
class Face:
    """One face in a picture.

    Attributes:
        box: (4,) x1, y1, x2, y2.
        points: (5, 2) left eye, right eye, nose tip, left and right corner of the mouth, as seen in the picture.
        score: the detector's confidence, 0..1; 1 from detectors that give none.
        measured: whether the network found all five points, rather than placing them by the box or the eyes.
    """

    box: np.ndarray
    points: np.ndarray
    score: float
    measured: bool = True

    @property
    def area(self) -> float:
        """Area of the box in pixels."""
        return float((self.box[2] - self.box[0]) * (self.box[3] - self.box[1]))


class Detector(Protocol):
    """Finds faces; `sizes` are the sides that it can scale a picture to, its usual one first."""

    name: str
    sizes: tuple[int, ...]

    def detect(self, picture: np.ndarray, size: int) -> list[Face]:
        """Faces of a uint8 picture (H, W, 3), the most certain first."""


class NoFaceError(ValueError):
    """No face was found where one is needed."""


def largest_first(faces: list[Face]) -> list[Face]:
    """The faces by the area of their boxes; equal ones keep the detector's order."""
    return sorted(faces, key=lambda face: -face.area)


def detect_with_retries(detector: Detector, picture: np.ndarray) -> list[Face]:
    """Faces at the first of the detector's sizes that shows any: small sizes find faces that fill the picture.

    Source of the sizes: TencentARC/PhotoMaker, photomaker/insightface_package.py.
    """
    for size in detector.sizes:
        faces = detector.detect(picture, size)
        if faces:
            return faces
    return []


def require_face(faces: list[Face], where: str, picture: np.ndarray) -> Face:
    """The first of the faces.

    Args:
        where: names the picture, the end of "No face was found in ...".

    Raises:
        NoFaceError: there is none.
    """
    if not faces:
        height, width = picture.shape[:2]
        raise NoFaceError(f"No face was found in {where} ({width}x{height}). {ADVICE}")
    return faces[0]


def overlap(box: np.ndarray, boxes: np.ndarray, pixel: float = 0.0) -> np.ndarray:
    """Intersection over union of one box with others (N, 4).

    Args:
        pixel: 1 counts both edge pixels as inside, as detectors trained on integer boxes do.
    """
    corner = np.maximum(box[:2], boxes[:, :2])
    sides = np.maximum(np.minimum(box[2:], boxes[:, 2:]) - corner + pixel, 0)
    shared = sides.prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2] + pixel).prod(axis=1)
    return shared / ((box[2:] - box[:2] + pixel).prod() + areas - shared)


def suppress_overlaps(boxes: np.ndarray, limit: float = MAX_OVERLAP, pixel: float = 0.0) -> list[int]:
    """Indices of the boxes (N, 4), the most certain first, that no better one overlaps by more than `limit`."""
    keep, remaining = [], np.arange(len(boxes))
    while len(remaining):
        best, remaining = remaining[0], remaining[1:]
        keep.append(int(best))
        remaining = remaining[overlap(boxes[best], boxes[remaining], pixel) <= limit]
    return keep
