"""Detectors: SCRFD's decoding, insightface on the same weights, and a real photograph without any download."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_faces import BOX, POINTS, BrightSpotDetector, spot_picture, write_detector, write_recogniser

from consistent_video.faces import mediapipe
from consistent_video.faces.alignment import ARCFACE_TEMPLATE, align_arcface, move_points, similarity_transform
from consistent_video.faces.detection import (
    Face,
    NoFaceError,
    detect_with_retries,
    largest_first,
    overlap,
    require_face,
    suppress_overlaps,
)
from consistent_video.faces.pictures import resize_bilinear
from consistent_video.faces.scrfd import SIZES, Scrfd
from consistent_video.faces.similarity import cosine

# Measured by hand in the photograph: both pupils.
ASTRONAUT_PUPILS = np.array([[203.2, 101.0], [246.5, 103.3]])


@pytest.fixture(scope="module")
def astronaut():
    """Eileen Collins, photograph by NASA (public domain), which scikit-image installs."""
    data = pytest.importorskip("skimage.data")
    return np.asarray(Image.open(f"{data.__path__[0]}/astronaut.png").convert("RGB"))


@pytest.fixture(scope="module")
def built_in():
    pytest.importorskip("skimage.feature")
    from consistent_video.faces.cascade import CascadeDetector

    return CascadeDetector()


def face(box, score=0.9):
    return Face(np.array(box, dtype=float), ARCFACE_TEMPLATE, score)


@pytest.mark.parametrize("batched", [False, True])
def test_scrfd_boxes_and_points_are_in_pixels(batched):
    faces = Scrfd(BrightSpotDetector(batched=batched), "det").detect(spot_picture(), 320)
    corner = np.array([96.0, 96.0])
    assert len(faces) == 1
    assert faces[0].box.tolist() == [96 - 16, 96 - 16, 96 + 48, 96 + 48]
    assert np.abs(faces[0].points - (corner + np.array(POINTS) * 8)).max() < 1e-4
    assert faces[0].score == pytest.approx((255 - 127.5) / 128) and faces[0].measured


def test_scrfd_scales_pictures_into_its_square():
    wide = spot_picture(640, 320, spots=((192, 192),), side=16)
    (found,) = Scrfd(BrightSpotDetector(), "det").detect(wide, 320)
    assert found.box.tolist() == [(96 - 16) * 2, (96 - 16) * 2, (96 + 48) * 2, (96 + 48) * 2]


def test_scrfd_tries_the_published_sizes_in_turn():
    session = BrightSpotDetector()
    assert detect_with_retries(Scrfd(session, "det"), np.zeros((50, 40, 3), dtype=np.uint8)) == []
    assert session.sizes == [640, 576, 512, 448, 384, 320, 256] == list(SIZES)
    fixed = BrightSpotDetector(size=320)
    detect_with_retries(Scrfd(fixed, "det"), np.zeros((50, 40, 3), dtype=np.uint8))
    assert fixed.sizes == [320]


def test_extreme_shapes_do_not_break_scrfd():
    for shape in ((1, 1, 3), (1, 5000, 3), (5000, 2, 3)):
        assert Scrfd(BrightSpotDetector(), "det").detect(np.zeros(shape, dtype=np.uint8), 256) == []


def test_a_network_of_another_kind_is_named():
    session = BrightSpotDetector()
    session.get_outputs = lambda: [SimpleNamespace(name="x", shape=[1, 512])]
    with pytest.raises(ValueError, match="glintr100.onnx has 1 outputs"):
        Scrfd(session, "glintr100.onnx")


def test_overlaps_are_suppressed_in_order():
    boxes = np.array([[0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30], [0, 0, 5, 10]], dtype=float)
    assert overlap(boxes[0], boxes).round(4).tolist() == [1.0, 0.6807, 0.0, 0.5]
    assert suppress_overlaps(boxes, 0.4) == [0, 2]
    assert suppress_overlaps(boxes, 0.6) == [0, 2, 3]


def test_the_largest_face_comes_first():
    faces = [face([0, 0, 10, 10], 0.9), face([0, 0, 30, 20], 0.6), face([5, 5, 15, 15], 0.5)]
    assert [round(found.area) for found in largest_first(faces)] == [600, 100, 100]
    assert largest_first(faces)[1] is faces[0]


def test_no_face_is_an_error_with_advice():
    with pytest.raises(NoFaceError, match=r"No face was found in the picture \(40x50\). Use a sharp"):
        require_face([], "the picture", np.zeros((50, 40, 3), dtype=np.uint8))


@pytest.mark.parametrize("height, width, tolerance", [(320, 320, 1e-3), (400, 300, 0.2), (200, 260, 0.2)])
def test_detection_is_that_of_insightface(tmp_path, height, width, tolerance):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    published = pytest.importorskip("insightface.model_zoo")
    from consistent_video.faces.onnx_session import open_session

    file = tmp_path / "det_10g.onnx"
    write_detector(file)
    noise = np.random.default_rng(3).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    picture = resize_bilinear(noise, width, height)
    reference = published.get_model(str(file), providers=["CPUExecutionProvider"])
    reference.prepare(0, input_size=(320, 320), det_thresh=0.5)
    boxes, points = reference.detect(picture[..., ::-1].copy())
    faces = Scrfd(open_session(file, "cpu"), str(file)).detect(picture, 320)
    found = np.array([[*face.box, face.score] for face in faces])
    if height == width == 320:
        assert len(boxes) == len(faces) > 10
    # Scaled pixels are rounded differently here and there: the certain faces are the same ones.
    certain = len(boxes) if height == width == 320 else 20
    assert np.abs(found[:certain] - boxes[:certain]).max() < tolerance
    assert np.abs(np.array([face.points for face in faces[:certain]]) - points[:certain]).max() < tolerance


def test_recognition_is_that_of_insightface(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    published = pytest.importorskip("insightface.model_zoo")
    from consistent_video.faces.arcface import ArcFace
    from consistent_video.faces.onnx_session import open_session

    file = tmp_path / "w600k_r50.onnx"
    write_recogniser(file)
    noise = np.random.default_rng(4).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    picture = resize_bilinear(noise, 400, 300)
    points = move_points(ARCFACE_TEMPLATE, np.array([[1.1, 0.2, 60], [-0.2, 1.1, 70]]))
    reference = published.get_model(str(file), providers=["CPUExecutionProvider"])
    from insightface.app.common import Face as PublishedFace

    expected = reference.get(picture[..., ::-1].copy(), PublishedFace(kps=points.astype(np.float32)))
    found = ArcFace(open_session(file, "cpu"), str(file)).embed(picture, Face(np.zeros(4), points, 1.0))
    assert found.shape == (512,)
    # OpenCV places samples on a grid of 1/32 pixel.
    assert cosine(found, expected) > 0.9999
    assert np.abs(found - expected).max() / np.abs(expected).max() < 1e-2


@pytest.mark.parametrize("scale", [0.5, 1, 2.5])
def test_a_real_face_is_found_and_aligned_without_downloads(astronaut, built_in, scale):
    side = round(512 * scale)
    picture = astronaut if scale == 1 else resize_bilinear(astronaut, side, side)
    found = largest_first(detect_with_retries(built_in, picture))[0]
    assert overlap(found.box / scale, np.array([[175.0, 68.0, 272.0, 165.0]]))[0] > 0.8
    assert np.abs(found.points[:2] / scale - ASTRONAUT_PUPILS).max() < 3
    matrix = similarity_transform(found.points, ARCFACE_TEMPLATE)
    aligned = move_points(ASTRONAUT_PUPILS * scale, matrix)
    assert np.abs(aligned - ARCFACE_TEMPLATE[:2]).max() < 3
    crop = align_arcface(picture, found.points)
    # Pupils are darker than the bridge of the nose between them.
    dark = [crop[51 - 2 : 51 + 3, x - 2 : x + 3].mean() for x in (38, 74)]
    assert max(dark) + 40 < crop[50:55, 53:59].mean()


def test_a_rotated_face_is_aligned_upright(astronaut, built_in):
    turned = np.asarray(Image.fromarray(astronaut).rotate(8, Image.Resampling.BICUBIC, center=(224, 115)))
    found = largest_first(detect_with_retries(built_in, turned))[0]
    across, down = found.points[1] - found.points[0]
    upright = np.degrees(np.arctan2(*(ASTRONAUT_PUPILS[1] - ASTRONAUT_PUPILS[0])[::-1]))
    assert np.degrees(np.arctan2(down, across)) == pytest.approx(upright - 8, abs=3)


def test_pictures_without_faces_have_none(built_in):
    for shape in ((1, 1, 3), (30, 900, 3), (300, 200, 3)):
        assert built_in.detect(np.full(shape, 90, dtype=np.uint8), 640) == []


def test_mediapipe_gives_five_of_its_points(monkeypatch):
    mesh = np.stack([np.arange(478.0), np.arange(478.0) + 0.5], axis=1)

    class Model:
        def __init__(self, state):
            self.variants = []

        def detect_batch(self, pictures, count, threshold, variant):
            self.variants.append(variant)
            found = {"bbox_xyxy": np.array([1.0, 2.0, 3.0, 4.0]), "landmarks_xy": mesh, "score": 0.7}
            return [[found] if variant == "full" else []]

    monkeypatch.setattr(mediapipe, "import_extra", lambda *_: SimpleNamespace(FaceLandmarkerModel=Model))
    state = {name if not name.endswith(".") else f"{name}x": None for name in mediapipe.REQUIRED}
    detector = mediapipe.MediaPipeDetector(state, "file")
    (found,) = detect_with_retries(detector, np.zeros((9, 9, 3), dtype=np.uint8))
    assert found.points[:, 0].tolist() == [468, 473, 1, 61, 291]
    assert found.box.tolist() == [1, 2, 3, 4] and found.score == pytest.approx(0.7)
    assert detector._model.variants == ["short", "full"]
    with pytest.raises(ValueError, match="no MediaPipe face landmark model"):
        mediapipe.MediaPipeDetector({"weight": None}, "file")


def test_the_tiny_detector_keeps_its_constants():
    assert len(BOX) == 4 and np.shape(POINTS) == (5, 2)
