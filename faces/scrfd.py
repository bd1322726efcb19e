"""SCRFD, the detector of insightface's model packs (Guo et al. 2021, arXiv 2105.04714).

The ONNX files have nine outputs: scores, boxes and key points for strides 8, 16 and 32, two anchors per cell; boxes and
points are distances from the cell's corner in units of the stride (deepinsight/insightface,
python-package/insightface/model_zoo/scrfd.py).
"""

from typing import Any

import numpy as np

from .detection import MAX_OVERLAP, MIN_SCORE, Face, suppress_overlaps
from .onnx_session import release
from .pictures import resize_bilinear

STRIDES = (8, 16, 32)
ANCHORS = 2
# 640 is insightface's; the smaller ones are PhotoMaker's retries.
SIZES = (640, 576, 512, 448, 384, 320, 256)


class Scrfd:
    """Detector over an onnxruntime session.

    Args:
        session: of an SCRFD file with key points.
        source: what to call the file in an error.

    Raises:
        ValueError: a network of another kind.
    """

    def __init__(self, session: Any, source: str):
        outputs = session.get_outputs()
        if len(outputs) != 3 * len(STRIDES):
            raise ValueError(
                f"{source} has {len(outputs)} outputs; a face detector with key points (SCRFD, such as det_10g.onnx "
                "of buffalo_l or scrfd_10g_bnkps.onnx of antelopev2) has 9. Restore the published model pack."
            )
        self.name = source
        self._session = session
        entry = session.get_inputs()[0]
        self._input = entry.name
        fixed = entry.shape[2] if isinstance(entry.shape[2], int) else None
        self.sizes = (fixed,) if fixed else SIZES

    def detect(self, picture: np.ndarray, size: int) -> list[Face]:
        """Faces of a uint8 picture (H, W, 3) that is scaled into a square of `size` pixels, the most certain first."""
        square, scale = _fit(picture, size)
        blob = (square.astype(np.float32) - 127.5) / 128.0
        outputs = self._session.run(None, {self._input: blob.transpose(2, 0, 1)[None]})
        # Files exported with a batch axis have one more axis.
        outputs = [output.reshape(-1, output.shape[-1]) for output in outputs]
        scores, boxes, points = _decode(outputs, size)
        certain = np.flatnonzero(scores >= MIN_SCORE)
        order = certain[np.argsort(-scores[certain], kind="stable")]
        boxes, points, scores = boxes[order] / scale, points[order] / scale, scores[order]
        keep = suppress_overlaps(boxes, MAX_OVERLAP, pixel=1.0)
        return [Face(boxes[index], points[index], float(scores[index])) for index in keep]

    def release(self) -> None:
        """Let go of what the session holds on a GPU until it is used again."""
        release(self._session)


def _fit(picture: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """The picture in the upper left of a black square, and its scale."""
    height, width = picture.shape[:2]
    if height > width:
        new_height, new_width = size, max(int(size * width / height), 1)
    else:
        new_height, new_width = max(int(size * height / width), 1), size
    square = np.zeros((size, size, 3), dtype=np.uint8)
    square[:new_height, :new_width] = resize_bilinear(picture, new_width, new_height)
    return square, new_height / height


def _decode(outputs: list[np.ndarray], size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (N,), boxes (N, 4) and key points (N, 5, 2) of all anchors, in pixels of the square."""
    scores, boxes, points = [], [], []
    for level, stride in enumerate(STRIDES):
        cells = size // stride
        rows, columns = np.mgrid[:cells, :cells]
        corners = np.stack([columns, rows], axis=-1).reshape(-1, 2).repeat(ANCHORS, axis=0) * float(stride)
        corners = corners.astype(np.float32)
        distances = outputs[level + len(STRIDES)] * stride
        scores.append(outputs[level][:, 0])
        boxes.append(np.concatenate([corners - distances[:, :2], corners + distances[:, 2:]], axis=1))
        shifts = outputs[level + 2 * len(STRIDES)].reshape(-1, 5, 2) * stride
        points.append(corners[:, None] + shifts)
    return np.concatenate(scores), np.concatenate(boxes), np.concatenate(points)
