"""From pictures to embeddings, with stand-ins for the published networks."""

import numpy as np
import pytest
import torch
from tiny_faces import POINTS, BrightSpotDetector, LinearRecogniser, spot_picture

from consistent_video.faces.alignment import PORTRAIT_TEMPLATE, similarity_transform, warp
from consistent_video.faces.arcface import ArcFace
from consistent_video.faces.detection import Face, NoFaceError
from consistent_video.faces.embeddings import encode_face, photomaker_embeddings
from consistent_video.faces.face_model import FaceModel
from consistent_video.faces.key_points import draw_key_points
from consistent_video.faces.pictures import to_image
from consistent_video.faces.scrfd import Scrfd


class Parser:
    """Labels the left half background."""

    def labels(self, crop):
        labels = torch.ones(crop.shape[:2], dtype=torch.long)
        labels[:, : crop.shape[1] // 2] = 0
        return labels


class Vision:
    """Keeps what it was shown."""

    def encode(self, pictures):
        self.seen = pictures
        return torch.arange(1.0, 769.0).expand(len(pictures), -1), [
            torch.full((1, 577, 1024), float(i)) for i in range(5)
        ]


class Aligner:
    """Returns given faces."""

    def __init__(self, *faces):
        self.faces = list(faces)

    def detect(self, picture, size=0):
        return self.faces


def detector():
    found = Scrfd(BrightSpotDetector(), "det")
    found.sizes = (320,)
    return found


def model(**parts):
    parts = {"recogniser": ArcFace(LinearRecogniser(), "rec"), "parser": Parser(), "vision": Vision(), **parts}
    return FaceModel("test", detector(), **parts)


def spot_points(x, y):
    return np.array([x, y]) + np.array(POINTS) * 8


def test_the_identity_is_arcface_then_vision():
    faces = model()
    embeds = encode_face(faces, to_image(spot_picture()))
    assert embeds.identity.shape == (1, 1280)
    assert torch.equal(embeds.identity[:, :512], embeds.embedding)
    assert embeds.identity[0, 512:].norm().item() == pytest.approx(1, abs=1e-6)
    expected = faces.recogniser.embed(spot_picture(), Face(np.zeros(4), spot_points(96, 96), 1.0))
    assert np.abs(embeds.embedding[0].numpy() - expected).max() < 1e-4
    assert embeds.embedding.norm() > 2  # as the network returns it
    assert [state.shape for state in embeds.hidden] == [(1, 577, 1024)] * 5


def test_the_aligned_picture_is_the_portrait_on_white():
    faces = model()
    picture = spot_picture()
    embeds = encode_face(faces, to_image(picture))
    matrix = similarity_transform(spot_points(96, 96), PORTRAIT_TEMPLATE)
    crop = warp(picture, matrix, 512, (132, 133, 135))
    assert embeds.picture.shape == (1, 512, 512, 3)
    assert (embeds.picture[0, :, :256] == 1).all()
    assert torch.equal(embeds.picture[0, :, 256:], torch.from_numpy(crop[:, 256:]).float() / 255)
    assert faces.vision.seen.shape == (1, 3, 512, 512)
    assert torch.equal(faces.vision.seen[:, 0], faces.vision.seen[:, 2])
    assert np.abs(embeds.aligned_points - PORTRAIT_TEMPLATE).max() < 40
    assert np.abs(embeds.points - spot_points(96, 96)).max() < 1e-3


def test_without_alignment_the_picture_stays():
    faces = model()
    picture = spot_picture(320, 200)
    embeds = encode_face(faces, to_image(picture), align=False)
    assert torch.equal(embeds.picture, to_image(picture))
    assert faces.vision.seen.shape == (1, 3, 200, 200)
    assert torch.equal(faces.vision.seen[0].movedim(0, -1), to_image(picture)[0, :, 60:260])
    assert np.array_equal(embeds.points, embeds.aligned_points)


def test_the_aligner_shows_the_face_that_is_recognised():
    wanted = Face(np.array([85.0, 85, 140, 140]), spot_points(100, 98), 0.99)
    other = Face(np.array([200.0, 200, 319, 319]), spot_points(240, 240), 0.99)
    pytest.importorskip("cv2")
    embeds = encode_face(model(aligner=Aligner(other, wanted)), to_image(spot_picture()))
    assert np.abs(embeds.aligned_points - PORTRAIT_TEMPLATE).max() < 60
    assert np.abs(embeds.points - spot_points(96, 96)).max() < 1e-3


def test_what_only_the_aligner_finds_is_recognised_in_its_crop():
    pytest.importorskip("cv2")
    only = Face(np.array([85.0, 85, 140, 140]), spot_points(100, 98), 0.99)
    faces = model(aligner=Aligner(only))
    dark = np.full((320, 320, 3), 40, dtype=np.uint8)
    embeds = encode_face(faces, to_image(dark))
    from consistent_video.faces.retinaface import robust_portrait

    crop, _ = robust_portrait(dark, only.points)
    assert np.array_equal(embeds.embedding[0].numpy(), faces.recogniser.embed_crop(crop))


def test_large_pictures_are_limited_and_alpha_is_dropped():
    picture = np.kron(spot_picture(512, 512, spots=((192, 192),), side=16), np.ones((4, 4, 1), dtype=np.uint8))
    image = torch.cat([to_image(picture), torch.zeros(1, 2048, 2048, 1)], dim=-1)
    faces = model()
    embeds = encode_face(faces, image, align=False)
    assert embeds.picture.shape == (1, 1024, 1024, 3)
    assert 300 < embeds.points[0, 0] < 500  # 192 / 512 of 1024, and some


def test_without_published_weights_alignment_still_works():
    bare = FaceModel("bare", detector(), missing={"recogniser": "Unpack antelopev2.", "vision": "Put EVA."})
    embeds = encode_face(bare, to_image(spot_picture()))
    assert embeds.picture.shape == (1, 512, 512, 3) and embeds.hidden == [] and embeds.embedding is None
    with pytest.raises(FileNotFoundError, match="no identity.*Unpack antelopev2. Put EVA."):
        _ = embeds.identity
    with pytest.raises(FileNotFoundError, match="'bare' finds and aligns faces but.*Unpack antelopev2."):
        photomaker_embeddings(bare, to_image(spot_picture()))


def test_no_face_gives_advice():
    with pytest.raises(NoFaceError, match=r"in the picture \(64x64\). Use a sharp"):
        encode_face(model(), torch.zeros(1, 64, 64, 3))
    with pytest.raises(NoFaceError, match="in any of the 2 pictures"):
        photomaker_embeddings(model(), torch.zeros(2, 64, 64, 3))


def test_photomaker_leaves_out_pictures_without_a_face():
    images = torch.cat(
        [to_image(spot_picture()), torch.zeros(1, 320, 320, 3), to_image(spot_picture(spots=((48, 48),)))]
    )
    before = images.clone()
    faces = model()
    embeddings, kept = photomaker_embeddings(faces, images)
    assert kept == [0, 2] and embeddings.shape == (2, 512)
    expected = faces.recogniser.embed(spot_picture(), Face(np.zeros(4), spot_points(96, 96), 1.0))
    assert np.abs(embeddings[0].numpy() - expected).max() < 1e-4
    assert torch.equal(images, before)


def test_photomaker_takes_the_first_or_the_largest_face():
    small = Face(np.array([10.0, 10, 40, 40]), spot_points(20, 20), 0.9)
    large = Face(np.array([100.0, 100, 200, 200]), spot_points(100, 100), 0.8)

    class Both:
        sizes = (0,)

        def detect(self, picture, size):
            return [small, large]

    recogniser = ArcFace(LinearRecogniser(), "rec")
    faces = FaceModel("both", Both(), recogniser)
    picture = spot_picture()
    for select, face in (("first", small), ("largest", large)):
        embeddings, _ = photomaker_embeddings(faces, to_image(picture), select)
        assert np.array_equal(embeddings[0].numpy(), recogniser.embed(picture, face))
    with pytest.raises(ValueError, match="Unknown selection of faces 'best'"):
        photomaker_embeddings(faces, to_image(picture), "best")


def test_key_points_are_drawn_in_their_colours():
    points = np.array([[100.0, 120], [180, 118], [141, 160], [110, 200], [175, 202]])
    image = draw_key_points(points, 300, 260)
    assert image.shape == (1, 260, 300, 3)
    pixels = image[0].mul(255).round().int()
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    assert [tuple(pixels[int(y), int(x)].tolist()) for x, y in points] == colors
    assert tuple(pixels[140, 120].tolist()) == (153, 0, 0)
    assert pixels[20, 20].sum() == 0


def test_key_points_are_drawn_as_in_diffusers():
    opencv = pytest.importorskip("cv2")
    points = np.array([[100.0, 120], [180, 118], [141, 160], [110, 200], [175, 202]])
    canvas = np.zeros((260, 300, 3))
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255)]
    for index in (0, 1, 3, 4):
        (x0, y0), (x1, y1) = points[index], points[2]
        angle = int(np.degrees(np.arctan2(y0 - y1, x0 - x1)))
        middle, length = (int((x0 + x1) / 2), int((y0 + y1) / 2)), int(np.hypot(x0 - x1, y0 - y1) / 2)
        polygon = opencv.ellipse2Poly(middle, (length, 4), angle, 0, 360, 1)
        opencv.fillConvexPoly(canvas, polygon, colors[index])
    canvas = (canvas * 0.6).astype(np.uint8)
    for (x, y), color in zip(points, colors):
        opencv.circle(canvas, (int(x), int(y)), 10, color, -1)
    drawn = draw_key_points(points, 300, 260)[0].mul(255).round().numpy()
    assert (np.abs(drawn - canvas).max(axis=-1) > 0).sum() < 10 < (canvas.max(axis=-1) > 0).sum()


def test_a_recogniser_of_another_kind_is_named():
    session = LinearRecogniser(side=100)
    with pytest.raises(ValueError, match="genderage.onnx reads"):
        ArcFace(session, "genderage.onnx")
