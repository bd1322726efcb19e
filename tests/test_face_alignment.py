"""Alignment of faces: transforms, crops and scaling against exact cases, scikit-image and OpenCV."""

import numpy as np
import pytest
import torch

from consistent_video.faces.alignment import (
    ARCFACE_TEMPLATE,
    PORTRAIT_BORDER,
    PORTRAIT_TEMPLATE,
    align_arcface,
    align_portrait,
    move_points,
    similarity_transform,
    warp,
)
from consistent_video.faces.pictures import limit_long_side, resize_bilinear, to_image, to_picture

POINTS = np.array([[203.0, 101.0], [246.5, 103.5], [224.0, 125.0], [202.0, 139.5], [248.0, 139.0]])
RECORDED = (
    (ARCFACE_TEMPLATE, [[0.867492, 0.012608, -140.432453], [-0.012608, 0.867492, -30.75323]]),
    (PORTRAIT_TEMPLATE, [[3.005931, 0.043922, -424.200015], [-0.043922, 3.005931, -48.30754]]),
)


def smooth_picture(height, width, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return resize_bilinear(noise, width, height)


def test_a_known_transform_is_recovered():
    angle, scale = 0.3, 1.7
    known = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0]]) * scale
    known[:, 2] = (12.5, -40)
    found = similarity_transform(POINTS, move_points(POINTS, known))
    assert np.abs(found - known).max() < 1e-9


def test_mirrored_points_are_not_mirrored_back():
    mirrored = POINTS * [-1, 1]
    matrix = similarity_transform(mirrored, ARCFACE_TEMPLATE)
    assert np.linalg.det(matrix[:, :2]) > 0

    def error(scale):
        linear = scale * matrix[:, :2]
        centred = (mirrored - mirrored.mean(axis=0)) @ linear.T
        return np.square(centred - (ARCFACE_TEMPLATE - ARCFACE_TEMPLATE.mean(axis=0))).sum()

    assert error(1) < min(error(0.99), error(1.01))  # the scale is that of the least squares, too


@pytest.mark.parametrize("template", [ARCFACE_TEMPLATE, PORTRAIT_TEMPLATE], ids=["arcface", "portrait"])
def test_the_transform_is_that_of_scikit_image(template):
    transform = pytest.importorskip("skimage.transform")
    published = transform.SimilarityTransform.from_estimate(POINTS, template).params[:2]
    assert np.abs(similarity_transform(POINTS, template) - published).max() < 1e-9


@pytest.mark.parametrize("template, expected", RECORDED, ids=["arcface", "portrait"])
def test_the_transform_has_the_recorded_values(template, expected):
    """Values of scikit-image 0.26, for installations without it."""
    assert np.abs(similarity_transform(POINTS, template) - expected).max() < 1e-5


@pytest.mark.parametrize(
    "points", [np.zeros((5, 2)), np.full((5, 2), np.nan), POINTS[:3]], ids=["coincident", "nan", "three"]
)
def test_points_that_cannot_be_aligned_are_named(points):
    with pytest.raises(ValueError, match="key points"):
        similarity_transform(points, ARCFACE_TEMPLATE)


def test_a_shift_by_whole_pixels_copies_pixels():
    picture = smooth_picture(40, 50)
    crop = warp(picture, np.array([[1.0, 0, -10], [0, 1, -5]]), 24)
    assert np.array_equal(crop, picture[5:29, 10:34])


def test_outside_the_picture_is_the_border():
    picture = np.zeros((512, 200, 3), dtype=np.uint8)
    crop = align_portrait(picture, PORTRAIT_TEMPLATE)
    assert not crop[:, :200].any()
    assert (crop[:, 200:] == PORTRAIT_BORDER).all()
    assert not align_arcface(picture + np.uint8(200), ARCFACE_TEMPLATE + 1000).any()


@pytest.mark.parametrize("align, side", [(align_arcface, 112), (align_portrait, 512)])
def test_crops_are_those_of_opencv(align, side):
    opencv = pytest.importorskip("cv2")
    picture = smooth_picture(300, 400)
    template, border = (ARCFACE_TEMPLATE, 0) if side == 112 else (PORTRAIT_TEMPLATE, PORTRAIT_BORDER)
    matrix = similarity_transform(POINTS, template)
    published = opencv.warpAffine(picture, matrix, (side, side), borderValue=border)
    found = align(picture, POINTS)
    difference = np.abs(found.astype(int) - published)
    assert found.shape == (side, side, 3)
    assert difference.max() <= 3 and difference.mean() < 0.5


@pytest.mark.parametrize("size", [(1500, 1100), (1030, 2000), (700, 1025)])
def test_the_long_side_is_limited_as_by_opencv(size):
    opencv = pytest.importorskip("cv2")
    picture = smooth_picture(*size)
    scale = 1024 / max(size)
    shape = (int(size[1] * scale), int(size[0] * scale))
    published = opencv.resize(picture, shape, interpolation=opencv.INTER_LANCZOS4)
    found = limit_long_side(picture, 1024)
    assert max(found.shape) == 1024 and found.shape == published.shape
    assert np.abs(found.astype(int) - published).max() <= 2


def test_bilinear_scaling_is_that_of_opencv():
    opencv = pytest.importorskip("cv2")
    picture = smooth_picture(333, 217)
    published = opencv.resize(picture, (120, 200))
    assert np.abs(resize_bilinear(picture, 120, 200).astype(int) - published).max() <= 1


def test_small_pictures_and_slivers_keep_their_pixels():
    picture = smooth_picture(64, 48)
    assert limit_long_side(picture, 64) is picture
    assert limit_long_side(smooth_picture(8, 9000), 1024).shape == (1, 1024, 3)
    flat = np.full((10, 3000, 3), 77, dtype=np.uint8)
    assert (limit_long_side(flat, 1000) == 77).all()


def test_images_become_pictures():
    image = torch.tensor([0.0, 0.5, 1.0, 2.0]).view(1, 2, 2, 1)
    assert to_picture(image)[..., 0].tolist() == [[0, 128], [255, 255]]
    with_alpha = torch.rand(4, 5, 4)
    assert np.array_equal(to_picture(with_alpha), to_picture(with_alpha[..., :3]))
    assert torch.equal(to_image(to_picture(torch.ones(1, 3, 3, 3))), torch.ones(1, 3, 3, 3))


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (8, 8, 5), (0, 8, 3), (8, 8)])
def test_other_shapes_are_named(shape):
    with pytest.raises(ValueError, match="one picture"):
        to_picture(torch.zeros(shape))


def test_values_that_are_no_numbers_are_named():
    with pytest.raises(ValueError, match="NaN"):
        to_picture(torch.full((4, 4, 3), float("nan")))
