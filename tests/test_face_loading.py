"""Finding and loading face networks in ComfyUI's folders."""

import sys
from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_faces import eva_state, spot_picture, write_pack, write_recogniser

from consistent_video.faces.embeddings import photomaker_embeddings
from consistent_video.faces.extras import import_extra
from consistent_video.faces.pictures import to_image
from consistent_video.loaders.face_model import (
    BUILT_IN,
    explain_missing_face_source,
    fingerprint_face_source,
    list_face_sources,
    load_face_model,
)

pytestmark = pytest.mark.usefixtures("memory_mode")


@pytest.fixture
def models(tmp_path, monkeypatch):
    """An empty ComfyUI models folder."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    kinds = {kind: value for kind, value in folder_paths.folder_names_and_paths.items()}
    for kind in ("diffusers", "clip_vision", "detection"):
        kinds[kind] = ([str(tmp_path / kind)], set())
        (tmp_path / kind).mkdir()
    for kind in ("insightface", "facexlib", "facedetection"):
        kinds.pop(kind, None)
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", kinds)
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


def fake_pack(folder: Path):
    folder.mkdir(parents=True)
    (folder / "det_10g.onnx").write_bytes(b"not onnx")


def test_sources_are_listed(models):
    assert list_face_sources() == [BUILT_IN]
    fake_pack(models / "insightface" / "models" / "buffalo_l")
    fake_pack(models / "insightface" / "models" / "antelopev2" / "antelopev2")
    checkpoint = models / "diffusers" / "ConsisID-preview"
    fake_pack(checkpoint / "face_encoder" / "models" / "antelopev2")
    (checkpoint / "model_index.json").write_text("{}", encoding="utf-8")
    save_file({"detector_short.stem.weight": torch.zeros(1)}, models / "detection" / "mediapipe.safetensors")
    save_file({"other": torch.zeros(1)}, models / "detection" / "other.safetensors")
    assert list_face_sources() == [
        "ConsisID-preview/face_encoder",
        "insightface/antelopev2",
        "insightface/buffalo_l",
        "mediapipe/mediapipe.safetensors",
        BUILT_IN,
    ]
    assert all(explain_missing_face_source(name) is True for name in list_face_sources())


def test_a_source_is_another_one_when_a_file_joins_it_or_changes(models):
    """Otherwise ComfyUI's cache would go on with a face model that lacks what a message asked for."""
    pack = models / "insightface" / "models" / "buffalo_l"
    fake_pack(pack)
    source, known = "insightface/buffalo_l", set()
    known.add(fingerprint_face_source(source))
    assert known == {fingerprint_face_source(source)}
    (pack / "w600k_r50.onnx").write_bytes(b"added")
    known.add(fingerprint_face_source(source))
    (pack / "w600k_r50.onnx").write_bytes(b"rewritten")
    known.add(fingerprint_face_source(source))
    (models / "clip_vision" / "EVA02_CLIP_L_336_psz14_s6B.pt").write_bytes(b"a part")
    known.add(fingerprint_face_source(source))
    assert len(known) == 4
    assert fingerprint_face_source(BUILT_IN) != fingerprint_face_source(source)


def test_a_missing_source_says_where_it_goes(models):
    message = explain_missing_face_source("insightface/antelopev2")
    for part in ("antelopev2", "buffalo_l", "deepinsight/insightface", "non-commercial", str(models / "insightface")):
        assert part in message
    with pytest.raises(FileNotFoundError, match="'insightface/antelopev2' was not found"):
        load_face_model("insightface/antelopev2")


def test_the_built_in_detector_loads_and_names_what_is_missing(models):
    pytest.importorskip("skimage.feature")
    model = load_face_model(BUILT_IN)
    assert (model.recogniser, model.aligner, model.parser, model.vision) == (None, None, None, None)
    assert sorted(model.missing) == ["aligner", "parser", "recogniser", "vision"]
    assert "xinntao/facexlib" in model.missing["parser"] and str(models / "facexlib") in model.missing["parser"]
    assert "QuanSun/EVA-CLIP" in model.missing["vision"] and str(models / "clip_vision") in model.missing["vision"]


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match="Reading needs the optional package onnxruntime.*pip install onnxruntime"):
        import_extra("onnxruntime", "onnxruntime", "Reading")


def test_a_pack_loads_and_embeds(models):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    write_pack(models / "insightface" / "models" / "antelopev2")
    (models / "insightface" / "models" / "antelopev2" / "1k3d68.onnx").write_bytes(b"never opened")
    model = load_face_model("insightface/antelopev2", "cpu")
    assert model.detector.sizes[0] == 640 and model.recogniser.side == 112
    assert "recogniser" not in model.missing
    embeddings, kept = photomaker_embeddings(model, to_image(spot_picture()))
    assert embeddings.shape == (1, 512) and kept == [0] and embeddings.isfinite().all()
    again, _ = photomaker_embeddings(load_face_model("insightface/antelopev2", "auto"), to_image(spot_picture()))
    assert torch.equal(embeddings, again)


def test_damaged_packs_and_absent_providers_are_named(models):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    pack = models / "insightface" / "models" / "buffalo_l"
    fake_pack(pack)
    with pytest.raises(ValueError, match=r"det_10g.onnx \(8 bytes\) cannot be opened"):
        load_face_model("insightface/buffalo_l", "cpu")
    (pack / "det_10g.onnx").unlink()
    write_recogniser(pack / "w600k_r50.onnx")
    with pytest.raises(FileNotFoundError, match="has no face detector; found w600k_r50.onnx"):
        load_face_model("insightface/buffalo_l", "cpu")
    if "DmlExecutionProvider" not in runtime.get_available_providers():
        with pytest.raises(ValueError, match="has no DmlExecutionProvider"):
            load_face_model("insightface/buffalo_l", "directml")
    with pytest.raises(ValueError, match="Unknown provider 'tpu'"):
        load_face_model("insightface/buffalo_l", "tpu")


def test_the_vision_tower_is_found_in_shared_folders(models):
    pytest.importorskip("skimage.feature")
    pytest.importorskip("timm")
    torch.save(eva_state(), models / "clip_vision" / "EVA02_CLIP_L_336_psz14_s6B.pt")
    model = load_face_model(BUILT_IN)
    pooled, states = model.vision.encode(torch.rand(1, 3, 64, 64))
    assert pooled.shape == (1, 768) and len(states) == 5 and "vision" not in model.missing


def test_a_damaged_file_of_a_part_is_named(models):
    pytest.importorskip("skimage.feature")
    (models / "facexlib").mkdir()
    (models / "facexlib" / "parsing_bisenet.pth").write_bytes(np.zeros(99, dtype=np.uint8).tobytes())
    with pytest.raises(ValueError, match="parsing_bisenet.pth is damaged"):
        load_face_model(BUILT_IN)
