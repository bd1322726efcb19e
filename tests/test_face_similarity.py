"""Similarity of faces over the frames of a clip."""

import numpy as np
import pytest
import torch
from tiny_faces import BrightSpotDetector, LinearRecogniser, spot_picture

from consistent_video.faces.arcface import ArcFace
from consistent_video.faces.detection import NoFaceError
from consistent_video.faces.face_model import FaceModel
from consistent_video.faces.pictures import to_image
from consistent_video.faces.scrfd import Scrfd
from consistent_video.faces.similarity import Similarities, compare_faces, cosine, plot_similarities


@pytest.fixture
def model():
    detector = Scrfd(BrightSpotDetector(), "det")
    detector.sizes = (320,)
    return FaceModel("test", detector, ArcFace(LinearRecogniser(), "rec"))


def test_cosine_values():
    assert cosine([1, 0], [0, 3]) == 0
    assert cosine([2, 2], [5, 5]) == pytest.approx(1)
    assert cosine([1, 0], [-4, 0]) == -1
    assert cosine([3, 4], [4, 3]) == pytest.approx(24 / 25)
    for values in ([0, 0], [np.nan, 1]):
        with pytest.raises(ValueError, match="zero or not finite"):
            cosine([1, 2], values)


def test_frames_are_compared_with_the_reference(model):
    same, other = spot_picture(), spot_picture()
    other[60:180, 100:150] = (250, 10, 10)
    other[96:104, 96:104] = 255
    images = torch.cat([to_image(same), to_image(other), torch.zeros(1, 320, 320, 3)])
    result = compare_faces(model, to_image(same), images)
    recogniser = model.recogniser
    crops = [recogniser.embed(picture, model.detector.detect(picture, 320)[0]) for picture in (same, other)]
    assert result.values == pytest.approx([1.0, cosine(*crops), 0.0])
    assert result.values[1] < 0.99
    assert result.found == [True, True, False]
    assert result.mean == pytest.approx(sum(result.values[:2]) / 2)
    assert result.best == 0


def test_the_most_similar_face_of_a_frame_counts(model):
    both = spot_picture(spots=((96, 96), (224, 200)))
    both[180:260, 230:300, 0] = 200
    both[200:208, 224:232] = 255
    assert len(model.detector.detect(both, 320)) == 2
    result = compare_faces(model, to_image(spot_picture()), to_image(both))
    assert result.values[0] == pytest.approx(1, abs=1e-3)


def test_a_reference_without_a_face_is_an_error(model):
    with pytest.raises(NoFaceError, match="the reference picture"):
        compare_faces(model, torch.zeros(1, 50, 50, 3), to_image(spot_picture()))


def test_a_clip_without_faces_is_similar_to_nothing(model):
    result = compare_faces(model, to_image(spot_picture()), torch.zeros(2, 64, 64, 3))
    assert (result.values, result.found, result.mean, result.best) == ([0.0, 0.0], [False, False], 0.0, 0)
    with pytest.raises(FileNotFoundError, match="identity embeddings need published weights"):
        compare_faces(FaceModel("bare", model.detector), to_image(spot_picture()), torch.zeros(1, 64, 64, 3))


def test_the_plot_follows_the_values():
    values = [0.2, 0.9, 0.0, 0.5]
    plot = plot_similarities(Similarities(values, [True, True, False, True], 1.6 / 3, 1))
    pixels = plot[0].mul(255).round().int()
    assert plot.shape == (1, 320, 640, 3)
    blue = (pixels == torch.tensor([31, 119, 180], dtype=torch.int32)).all(dim=-1)
    heights = [blue[:, 48 + round(index * 576 / 3)].nonzero().float().mean().item() for index in (0, 1, 3)]
    assert heights[1] < heights[2] < heights[0]
    assert heights[1] == pytest.approx(292 - 0.9 * 268, abs=3)
    assert tuple(pixels[40, 48 + 384].tolist()) == (255, 224, 178)


@pytest.mark.parametrize("values", [[0.4], [-0.3, 0.2]])
def test_short_and_negative_clips_can_be_plotted(values):
    plot = plot_similarities(Similarities(values, [True] * len(values), values[0], 0))
    assert plot.isfinite().all() and plot.min() < 0.5
