"""Networks that look at faces, and PhotoMaker."""

import importlib.util
import tempfile
from pathlib import Path

import comfy.model_management
import numpy as np
import tiny_faces
import tiny_photomaker
import torch

from consistent_video.faces import eva_vision, parsing, photomaker_faces, retinaface
from consistent_video.faces.arcface import ArcFace
from consistent_video.faces.embeddings import encode_face
from consistent_video.faces.face_model import FaceModel
from consistent_video.faces.photomaker import encode_tensors
from consistent_video.faces.pictures import to_image
from consistent_video.faces.scrfd import Scrfd
from consistent_video.loaders.photomaker import load_photomaker

from .scenes import Stage, pictures_of, scene


@scene
def faces(stage: Stage) -> None:
    """From a picture to ConsisID's identity; a pixel that two labels fit may get another one in another precision."""
    if not all(map(importlib.util.find_spec, ("facexlib", "timm"))):
        return
    model = face_model()
    face = encode_face(model, to_image(tiny_faces.spot_picture()))
    stage.keep("faces.picture", face.picture)
    stage.keep("faces.identity", face.identity)
    stage.keep("faces.hidden", face.hidden[2])
    crop = (pictures_of(256, 256, 3) * 255).to(torch.uint8).numpy()
    found = aligner().detect(crop)
    stage.keep("faces.points", torch.tensor(np.stack([face.points for face in found[:3]])))


@scene
def photomaker(stage: Stage) -> None:
    """Both versions, over SDXL's text encoders, with embeddings of a face model for the second."""
    clip = tiny_photomaker.tiny_clip()
    images = torch.cat([to_image(tiny_faces.spot_picture()), to_image(tiny_faces.spot_picture(spots=((160, 96),)))])
    spots = FaceModel("spots", spot_detector(), ArcFace(tiny_faces.LinearRecogniser(), "rec"))
    with tempfile.TemporaryDirectory() as folder:
        for version in ("v1", "v2"):
            file = Path(folder) / f"{version}.safetensors"
            encoder, _ = load_photomaker(tiny_photomaker.write_photomaker(file, version, 64, lora=False))
            embeds, shown = photomaker_faces.faces_for_photomaker(encoder, images, spots, None)
            kept = images if shown is None else images[shown.to(images.device)]
            prompt = "a photo of a man img, in a park"
            found = encode_tensors(encoder, clip, kept, prompt, face_embeds=embeds)
            stage.keep(f"photomaker.{version}", found.merged)
            stage.keep(f"photomaker.{version}.text", found.text_only)
    comfy.model_management.unload_all_models()


def face_model() -> FaceModel:
    """Detector and recogniser that need no files, and the published parser and vision tower with random weights."""
    from facexlib.parsing.bisenet import BiSeNet

    torch.manual_seed(0)
    vision = eva_vision.EvaVision(tiny_faces.eva_state(), "vision")
    torch.manual_seed(0)
    parser = parsing.FaceParser(BiSeNet(num_class=parsing.CLASSES).state_dict(), "parser")
    recogniser = ArcFace(tiny_faces.LinearRecogniser(), "recogniser")
    return FaceModel("tiny", spot_detector(), recogniser, None, parser, vision)


def spot_detector() -> Scrfd:
    return Scrfd(tiny_faces.BrightSpotDetector(), "detector")


def aligner() -> retinaface.RetinaFace:
    """RetinaFace with random weights, which finds faces everywhere."""
    from facexlib.detection.retinaface import RetinaFace

    torch.manual_seed(0)
    retinaface.MIN_SCORE = 0.5
    state = RetinaFace("resnet50", device=torch.device("cpu")).state_dict()
    # so that boxes are of a size that numbers can hold
    state = {key: 0.01 * value if key.startswith("BboxHead") else value for key, value in state.items()}
    return retinaface.RetinaFace(state, "aligner")
