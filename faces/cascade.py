"""A detector that needs no download: scikit-image's cascade of local binary patterns, and eyes by their gradients.

It finds upright faces seen from the front. It measures the two eyes; nose and mouth follow from them by the mean face
of ArcFace's template, so that crops are aligned, though less exactly than by a trained landmark network.
"""

import numpy as np

from .alignment import ARCFACE_TEMPLATE, move_points, similarity_transform
from .detection import Face, largest_first
from .extras import import_extra
from .pictures import resize_bilinear

PURPOSE = "The built-in face detector"
CASCADE = "lbpcascade_frontalface_opencv.xml"
# Pictures are searched at this longer side, for faces of at least MIN_FACE pixels.
SIZES = (640,)
MIN_FACE = 40
SCALE_STEP = 1.15
# Where the pupils usually are in a box of the cascade, as fractions of its side, and how far away they are looked for.
PUPILS = np.array([[0.31, 0.36], [0.70, 0.36]])
REACH = 0.13
EYE_PIXELS = 25
# Distance between the pupils in box sides, and steepest line between them, that are believed.
DISTANCES = (0.25, 0.60)
MAX_SLOPE = 0.6


class CascadeDetector:
    """Detector of faces seen from the front.

    Raises:
        ImportError: scikit-image is not installed.
    """

    name = "built-in (scikit-image)"
    sizes = SIZES

    def __init__(self):
        cascade = import_extra("skimage.feature", "scikit-image", PURPOSE).Cascade
        data = import_extra("skimage.data", "scikit-image", PURPOSE)
        self._cascade = cascade(data.lbp_frontal_face_cascade_filename())

    def detect(self, picture: np.ndarray, size: int) -> list[Face]:
        """Faces of a uint8 picture (H, W, 3) that is scaled to a longer side of `size` pixels, the largest first."""
        scale = size / max(picture.shape[:2])
        width, height = (max(round(side * scale), 1) for side in picture.shape[1::-1])
        if min(width, height) < MIN_FACE:
            return []
        scaled = resize_bilinear(picture, width, height)
        found = self._cascade.detect_multi_scale(
            img=scaled,
            scale_factor=SCALE_STEP,
            step_ratio=1,
            min_size=(MIN_FACE, MIN_FACE),
            max_size=(min(width, height), min(width, height)),
        )
        luminance = scaled.astype(np.float64) @ [0.299, 0.587, 0.114]
        return largest_first([_face(luminance, box, scale) for box in found])


def _face(luminance: np.ndarray, found: dict, scale: float) -> Face:
    corner, side = np.array([found["c"], found["r"]], dtype=float), float(found["width"])
    pupils = np.array([_pupil(luminance, corner + place * side, side) for place in PUPILS])
    across, down = pupils[1] - pupils[0]
    distance = np.hypot(across, down) / side
    if not DISTANCES[0] <= distance <= DISTANCES[1] or abs(down) > MAX_SLOPE * across:
        pupils = corner + PUPILS * side
    points = move_points(ARCFACE_TEMPLATE, similarity_transform(ARCFACE_TEMPLATE[:2], pupils))
    box = np.concatenate([corner, corner + side])
    # Pixel centres of the scaled picture in the picture's own pixels.
    points, box = ((values + 0.5) / scale - 0.5 for values in (points, box))
    return Face(box, points, score=1.0, measured=False)


def _pupil(luminance: np.ndarray, expected: np.ndarray, side: float) -> np.ndarray:
    """The dark centre from which most gradients of an eye's surroundings point away.

    Source: Timm and Barth 2011, "Accurate eye centre localisation by means of gradients", equations 2 to 4.
    """
    reach = REACH * side
    steps = np.linspace(-reach, reach, EYE_PIXELS)
    patch = _sample(luminance, expected[0] + steps, expected[1] + steps)
    down, across = np.gradient(patch)
    strength = np.hypot(across, down)
    strong = strength > strength.mean() + 0.3 * strength.std()
    if not strong.any():
        return expected
    directions = np.stack([across[strong], down[strong]], axis=1) / strength[strong][:, None]
    rows, columns = np.nonzero(strong)
    places = np.stack([columns, rows], axis=1)
    candidates = np.stack(np.meshgrid(np.arange(EYE_PIXELS), np.arange(EYE_PIXELS)), axis=-1).reshape(-1, 2)
    away = places[None] - candidates[:, None]
    lengths = np.maximum(np.linalg.norm(away, axis=2), 1.0)
    agreement = np.maximum(np.einsum("cpd,pd->cp", away, directions) / lengths, 0) ** 2
    darkness = 255 - patch[candidates[:, 1], candidates[:, 0]]
    best = candidates[(agreement.mean(axis=1) * darkness).argmax()]
    return expected + steps[best]


def _sample(luminance: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Values on a grid of coordinates, bilinear, edges repeated, lightly smoothed: (len(y), len(x))."""
    height, width = luminance.shape
    x, y = x.clip(0, width - 1), y.clip(0, height - 1)
    left, top = np.minimum(x.astype(int), max(width - 2, 0)), np.minimum(y.astype(int), max(height - 2, 0))
    rows = luminance[top] * (1 - (y - top))[:, None] + luminance[np.minimum(top + 1, height - 1)] * (y - top)[:, None]
    grid = rows[:, left] * (1 - (x - left)) + rows[:, np.minimum(left + 1, width - 1)] * (x - left)
    padded = np.pad(grid, 1, mode="edge")
    return sum(padded[row : row + len(y), column : column + len(x)] for row in range(3) for column in range(3)) / 9
