"""The whole face pipeline against diffusers' `process_face_embeddings_infer`, on tiny networks.

It runs where everything that the reference needs is installed: insightface, facexlib, consisid_eva_clip.
"""

import os

import numpy as np
import pytest
import torch
from tiny_faces import (
    EVA_DEPTH,
    EVA_GRID,
    EVA_HIDDEN,
    EVA_OUTPUT,
    EVA_PATCH,
    EVA_WIDTH,
    eva_state,
    write_recogniser,
)

from consistent_video.faces.alignment import PORTRAIT_TEMPLATE
from consistent_video.faces.arcface import ArcFace
from consistent_video.faces.detection import Face
from consistent_video.faces.embeddings import encode_face
from consistent_video.faces.eva_vision import EvaVision
from consistent_video.faces.face_model import FaceModel
from consistent_video.faces.onnx_session import open_session
from consistent_video.faces.parsing import FaceParser
from consistent_video.faces.pictures import resize_bilinear, to_image
from consistent_video.faces.similarity import cosine

# A turned face whose nose does not fit the template, in a picture of 1024 x 819.
KEY_POINTS = PORTRAIT_TEMPLATE @ np.array([[0.9, 0.2], [-0.2, 0.9]]) + [
    [150, 60],
    [151, 61],
    [170, 60],
    [149, 60],
    [150, 59],
]
BOX = np.array([330.0, 180, 560, 480])


@pytest.fixture(scope="module")
def reference():
    pytest.importorskip("insightface")
    pytest.importorskip("facexlib")
    pytest.importorskip("consisid_eva_clip")
    return pytest.importorskip("diffusers.pipelines.consisid.consisid_utils")


@pytest.fixture(scope="module")
def recogniser_file(tmp_path_factory):
    pytest.importorskip("onnx")
    file = tmp_path_factory.mktemp("faces") / "glintr100.onnx"
    write_recogniser(file)
    return file


@pytest.fixture(scope="module")
def parsing_state():
    bisenet = pytest.importorskip("facexlib.parsing.bisenet")
    torch.manual_seed(0)
    return bisenet.BiSeNet(num_class=19).state_dict()


@pytest.fixture
def picture():
    noise = np.random.default_rng(5).integers(0, 256, (60, 75, 3), dtype=np.uint8)
    return resize_bilinear(noise, 1500, 1200)


class Detector:
    """Finds the face, or nothing."""

    sizes = (640,)

    def __init__(self, *faces):
        self.faces = list(faces)

    def detect(self, picture, size=0):
        return self.faces


def published_tower(monkeypatch):
    """consisid_eva_clip's tower with the tiny weights."""
    model = pytest.importorskip("consisid_eva_clip.model")
    monkeypatch.setitem(os.environ, "RoPE", "1")
    settings = {
        "image_size": EVA_GRID * EVA_PATCH, "layers": EVA_DEPTH, "width": EVA_WIDTH, "head_width": 64,
        "mlp_ratio": (EVA_HIDDEN + 0.5) / EVA_WIDTH, "patch_size": EVA_PATCH, "eva_model_name": "eva-clip-l-14-336",
        "xattn": False, "fusedLN": False, "rope": True, "pt_hw_seq_len": 16, "intp_freq": True, "naiveswiglu": True,
        "subln": True, "drop_path_rate": 0,
    }  # fmt: skip
    tower = model._build_vision_tower(EVA_OUTPUT, settings).eval()
    state = {key.removeprefix("visual."): value for key, value in eva_state().items() if key.startswith("visual.")}
    state = {key: value for key, value in state.items() if "rope" not in key}
    missing, unexpected = tower.load_state_dict(state, strict=False)
    assert not unexpected and all("rope" in key for key in missing)
    return tower


def published_result(reference, monkeypatch, recogniser_file, parsing_state, picture, found):
    """What the reference returns for the picture: (id_cond, hidden, picture, key points)."""
    from facexlib.parsing.bisenet import BiSeNet
    from facexlib.utils.face_restoration_helper import FaceRestoreHelper
    from insightface.app.common import Face as PublishedFace
    from insightface.model_zoo import get_model

    network = get_model(str(recogniser_file), providers=["CPUExecutionProvider"])
    detection = np.array([[*BOX, 0.99, *KEY_POINTS.ravel()]], dtype=np.float32)

    class App:
        def get(self, image):
            if not found:
                return []
            face = PublishedFace(bbox=BOX, kps=KEY_POINTS.astype(np.float32), det_score=0.9)
            network.get(image, face)
            return [face]

    class Network:
        def detect_faces(self, image, threshold):
            return detection

    helper = FaceRestoreHelper.__new__(FaceRestoreHelper)
    helper.template_3points = helper.pad_blur = False
    helper.face_size, helper.face_template = (512, 512), PORTRAIT_TEMPLATE
    helper.face_det, helper.face_parse = Network(), BiSeNet(num_class=19).eval()
    helper.face_parse.load_state_dict(parsing_state)
    helper.clean_all()
    tower = published_tower(monkeypatch)
    statistics = (reference.OPENAI_DATASET_MEAN, reference.OPENAI_DATASET_STD)
    return reference.process_face_embeddings_infer(
        helper, tower, network, *statistics, App(), "cpu", torch.float32, picture
    )


@pytest.mark.parametrize("found", [True, False], ids=["detected", "only_aligned"])
def test_the_pipeline_is_the_reference(reference, monkeypatch, recogniser_file, parsing_state, picture, found):
    expected = published_result(reference, monkeypatch, recogniser_file, parsing_state, picture, found)
    face = Face(BOX, KEY_POINTS, 0.9)
    model = FaceModel(
        "tiny",
        Detector(face) if found else Detector(),
        recogniser=ArcFace(open_session(recogniser_file, "cpu"), str(recogniser_file)),
        aligner=Detector(face),
        parser=FaceParser(dict(parsing_state), "parsing_bisenet.pth"),
        vision=EvaVision(eva_state(), "EVA02_CLIP_L_336_psz14_s6B.pt"),
    )
    embeds = encode_face(model, to_image(picture))
    identity, hidden, shown, points = expected
    assert embeds.identity.shape == identity.shape == (1, 1280)
    # OpenCV rounds differently here and there; OpenCV 4 also places samples on a grid of 1/32 pixel.
    assert cosine(embeds.identity[0, :512], identity[0, :512]) > 0.9999
    assert cosine(embeds.identity[0, 512:], identity[0, 512:]) > 0.9999
    assert (embeds.identity[:, 512:] - identity[:, 512:]).abs().max() < 2e-3
    for state, published in zip(embeds.hidden, hidden):
        assert (state - published).abs().mean() < 1e-2
    assert len(embeds.hidden) == len(hidden) == 5
    assert np.abs(embeds.points - points).max() < 1e-3
    difference = np.abs(embeds.picture[0].mul(255).numpy() - np.asarray(shown))
    assert difference.shape == (512, 512, 3)
    assert (difference > 1).mean() < 0.002
