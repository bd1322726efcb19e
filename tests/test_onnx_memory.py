"""What onnxruntime holds on a GPU is given back when a face node has used it."""

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_faces

from consistent_video.faces import onnx_session
from consistent_video.faces.arcface import ArcFace
from consistent_video.faces.embeddings import encode_face, photomaker_embeddings
from consistent_video.faces.face_model import FaceModel
from consistent_video.faces.pictures import to_image
from consistent_video.faces.scrfd import Scrfd
from consistent_video.faces.similarity import compare_faces


class Opened:
    """Stands for onnxruntime's sessions: how many are open, and how often one was opened."""

    def __init__(self, provider: str) -> None:
        self.provider = provider
        self.times = self.alive = 0

    def open(self, file, provider):
        session = tiny_faces.BrightSpotDetector() if "det" in file.name else tiny_faces.LinearRecogniser()
        self.times += 1
        self.alive += 1
        return _Session(session, self)


class _Session:
    def __init__(self, session, opened) -> None:
        self.session, self.opened = session, opened
        self.get_inputs, self.get_outputs, self.run = session.get_inputs, session.get_outputs, session.run

    def get_providers(self):
        return [self.opened.provider]

    def __del__(self):
        self.opened.alive -= 1


@pytest.fixture
def open_model(monkeypatch, tmp_path):
    """A face model over files that onnxruntime computes on a provider."""

    def build(provider):
        opened = Opened(provider)
        monkeypatch.setattr(onnx_session, "open_session", opened.open)
        networks = []
        for name in ("det.onnx", "rec.onnx"):
            (tmp_path / name).write_bytes(b"")
            networks.append(onnx_session.OnnxNetwork(tmp_path / name))
        return FaceModel("test", Scrfd(networks[0], "det"), ArcFace(networks[1], "rec")), opened

    return build


USES = [
    lambda model, image: encode_face(model, image),
    lambda model, image: photomaker_embeddings(model, image.repeat(2, 1, 1, 1)),
    lambda model, image: compare_faces(model, image, image.repeat(2, 1, 1, 1)),
]


@pytest.mark.parametrize("use", USES)
def test_a_gpu_is_given_back_after_use(use, open_model):
    model, opened = open_model("CUDAExecutionProvider")
    assert (opened.times, opened.alive) == (2, 0)
    use(model, to_image(tiny_faces.spot_picture()))
    assert (opened.times, opened.alive) == (4, 0)


def test_a_gpu_is_given_back_when_no_face_is_found(open_model):
    model, opened = open_model("CUDAExecutionProvider")
    with pytest.raises(ValueError, match="face"):
        encode_face(model, to_image(np.zeros((64, 64, 3), dtype=np.uint8)))
    assert opened.alive == 0


def test_on_a_cpu_files_stay_open(open_model):
    model, opened = open_model("CPUExecutionProvider")
    encode_face(model, to_image(tiny_faces.spot_picture()))
    assert (opened.times, opened.alive) == (2, 2)


def test_inputs_and_outputs_are_known_while_nothing_is_open(open_model):
    model, _ = open_model("CUDAExecutionProvider")
    session = model.detector._session
    assert [(entry.name, entry.shape) for entry in session.get_inputs()] == [("input.1", [1, 3, "?", "?"])]
    assert len(session.get_outputs()) == 9 and isinstance(session.get_outputs()[0], SimpleNamespace)
