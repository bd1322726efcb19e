"""How alike faces are: cosine similarity of ArcFace embeddings over the frames of a clip, and its plot."""

from dataclasses import dataclass

import comfy.utils
import numpy as np
import torch
from PIL import Image, ImageDraw

from .detection import detect_with_retries, largest_first, require_face
from .face_model import FaceModel
from .pictures import to_image, to_picture

PLOT_SIZE = (640, 320)
MARGINS = (48, 24, 16, 28)  # left, top, right, bottom
LINE, MEAN_LINE, GAP, GRID, TEXT = (31, 119, 180), (214, 39, 40), (255, 224, 178), (221, 221, 221), (51, 51, 51)


@dataclass(frozen=True)
class Similarities:
    """Similarity of every picture to a reference.

    Attributes:
        values: cosine, -1..1, per picture; 0 where no face was found.
        found: whether a face was found, per picture.
        mean: over the pictures with a face; 0 if there is none.
        best: index of the most similar picture, 0 if no face was found.
    """

    values: list[float]
    found: list[bool]
    mean: float
    best: int


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine of the angle between two embeddings (N,), -1..1.

    Raises:
        ValueError: an embedding of length zero, or one that is not finite.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (first, second))
    lengths = np.linalg.norm(first) * np.linalg.norm(second)
    if not np.isfinite(lengths) or lengths == 0:
        raise ValueError(
            "A face embedding is zero or not finite, so it has no direction to compare. Check the file of the "
            "recognition network."
        )
    return float(first @ second / lengths)


def compare_faces(model: FaceModel, reference: torch.Tensor, images: torch.Tensor) -> Similarities:
    """Compare the largest face of a reference with the faces of pictures; in each the most similar one counts.

    Args:
        reference: IMAGE of one picture.
        images: IMAGE (B, H, W, C), such as the frames of a clip.

    Raises:
        FileNotFoundError: the face model has no recogniser.
        NoFaceError: the reference shows no face.
    """
    recogniser = model.require_recogniser()
    with model.in_use():
        picture = to_picture(reference)
        faces = largest_first(detect_with_retries(model.detector, picture))
        wanted = recogniser.embed(picture, require_face(faces, "the reference picture", picture))
        progress = comfy.utils.ProgressBar(len(images))
        values, found = [], []
        for image in images:
            picture = to_picture(image)
            faces = detect_with_retries(model.detector, picture)
            values.append(max((cosine(wanted, recogniser.embed(picture, face)) for face in faces), default=0.0))
            found.append(bool(faces))
            progress.update(1)
    known = [value for value, seen in zip(values, found) if seen]
    mean = sum(known) / len(known) if known else 0.0
    best = max((index for index, seen in enumerate(found) if seen), key=lambda index: values[index], default=0)
    return Similarities(values, found, mean, best)


def plot_similarities(similarities: Similarities) -> torch.Tensor:
    """Similarity over the frames, its mean as a line, frames without a face shaded: an IMAGE (1, 320, 640, 3)."""
    width, height = PLOT_SIZE
    left, top, right, bottom = MARGINS
    canvas = Image.new("RGB", PLOT_SIZE, "white")
    brush = ImageDraw.Draw(canvas)
    count = len(similarities.values)
    low = 0.0 if min(similarities.values) >= 0 else -1.0
    spacing = (width - left - right) / max(count - 1, 1)

    def row(value: float) -> float:
        return height - bottom - (value - low) / (1 - low) * (height - top - bottom)

    def column(index: int) -> float:
        return left + index * spacing if count > 1 else (left + width - right) / 2

    for index, seen in enumerate(similarities.found):
        if not seen:
            edges = (max(column(index) - spacing / 2, left), min(column(index) + spacing / 2, width - right))
            brush.rectangle((edges[0], top, edges[1], height - bottom), fill=GAP)
    for value in np.linspace(low, 1, 5):
        brush.line((left, row(value), width - right, row(value)), fill=GRID)
        brush.text((8, row(value) - 6), f"{value:.2f}", fill=TEXT)
    brush.line((left, row(similarities.mean), width - right, row(similarities.mean)), fill=MEAN_LINE)
    places = [(column(index), row(value)) for index, value in enumerate(similarities.values)]
    for index in range(count):
        if similarities.found[index]:
            x, y = places[index]
            brush.ellipse((x - 2, y - 2, x + 2, y + 2), fill=LINE)
            if index and similarities.found[index - 1]:
                brush.line((*places[index - 1], x, y), fill=LINE, width=2)
    seen = sum(similarities.found)
    brush.text((left, 6), f"mean {similarities.mean:.3f} of {seen} faces in {count} frames", fill=TEXT)
    brush.text((left, height - 20), "0", fill=TEXT)
    brush.text((width - right - 24, height - 20), str(count - 1), fill=TEXT)
    return to_image(np.asarray(canvas))
