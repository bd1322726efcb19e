"""Aligned face crops: the similarity transform that takes five key points to a template, and the crop it makes.

Key points are (5, 2) arrays of x, y in pixels, in the order left eye, right eye, nose tip, left and right corner of the
mouth, as seen in the picture.
"""

import numpy as np

# ArcFace's 112 x 112 crop: deepinsight/insightface, python-package/insightface/utils/face_align.py.
ARCFACE_SIDE = 112
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
# FFHQ's 512 x 512 crop: xinntao/facexlib, facexlib/utils/face_restoration_helper.py.
PORTRAIT_SIDE = 512
PORTRAIT_TEMPLATE = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)
# Grey around a picture in facexlib's crops; there (135, 133, 132) in the order blue, green, red.
PORTRAIT_BORDER = (132, 133, 135)


def similarity_transform(points: np.ndarray, template: np.ndarray) -> np.ndarray:
    """The rotation, scale and shift that takes points nearest to a template, in least squares: a (2, 3) matrix.

    Source: Umeyama 1991, "Least-squares estimation of transformation parameters between two point patterns",
    equations 40 to 43.

    Args:
        points, template: (N, 2), x and y.

    Raises:
        ValueError: the points coincide or are not numbers.
    """
    points = np.asarray(points, dtype=np.float64)
    if points.shape != template.shape or not np.isfinite(points).all():
        raise ValueError(
            f"Alignment needs {len(template)} key points (x, y) with finite values, found an array of "
            f"{points.shape}. Use a picture in which eyes, nose and mouth are visible."
        )
    center, target = points.mean(axis=0), template.mean(axis=0)
    variance = ((points - center) ** 2).sum(axis=1).mean()
    if variance < 1e-8:
        raise ValueError(
            "The five key points of the face lie on each other; no alignment follows from them. Use a larger picture "
            "of the face."
        )
    covariance = (template - target).T @ (points - center) / len(points)
    left, singular, right = np.linalg.svd(covariance)
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right)) or 1.0])
    rotation = left @ np.diag(signs) @ right
    scale = (singular * signs).sum() / variance
    return np.column_stack([scale * rotation, target - scale * rotation @ center])


def warp(picture: np.ndarray, matrix: np.ndarray, side: int, border: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    """The square crop (side, side, 3) that a (2, 3) matrix from picture to crop makes, bilinear.

    Args:
        picture: uint8 (H, W, 3).
        border: colour (red, green, blue) outside the picture.
    """
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    rows, columns = np.mgrid[:side, :side]
    x, y = np.einsum("ij,jrc->irc", inverse, np.stack([columns, rows, np.ones_like(rows)]))
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    across, down = (x - left)[..., None], (y - top)[..., None]
    upper = _pixels(picture, left, top, border) * (1 - across) + _pixels(picture, left + 1, top, border) * across
    lower = _pixels(picture, left, top + 1, border) * (1 - across)
    lower += _pixels(picture, left + 1, top + 1, border) * across
    return (upper * (1 - down) + lower * down).round().clip(0, 255).astype(np.uint8)


def align_arcface(picture: np.ndarray, points: np.ndarray, side: int = ARCFACE_SIDE) -> np.ndarray:
    """The crop that ArcFace networks read: uint8 (side, side, 3), black outside the picture.

    Raises:
        ValueError: key points from which no alignment follows.
    """
    return warp(picture, similarity_transform(points, ARCFACE_TEMPLATE * (side / ARCFACE_SIDE)), side)


def align_portrait(picture: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The crop with hair and neck that face parsing reads: uint8 (512, 512, 3), grey outside the picture.

    Raises:
        ValueError: key points from which no alignment follows.
    """
    return warp(picture, similarity_transform(points, PORTRAIT_TEMPLATE), PORTRAIT_SIDE, PORTRAIT_BORDER)


def move_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Where a (2, 3) matrix takes points (N, 2)."""
    return np.asarray(points) @ matrix[:, :2].T + matrix[:, 2]


def _pixels(picture: np.ndarray, x: np.ndarray, y: np.ndarray, border: tuple[int, int, int]) -> np.ndarray:
    height, width = picture.shape[:2]
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixels = picture[y.clip(0, height - 1), x.clip(0, width - 1)].astype(np.float64)
    return np.where(inside[..., None], pixels, np.array(border, dtype=np.float64))
