"""The face of a person as ConsisID's conditioning takes it."""

import comfy.sd

from ..models.consisid_conditioning import condition_prompts
from .embeddings import FaceEmbeds
from .key_points import draw_key_points


def condition_face(
    positive: list,
    negative: list,
    vae: comfy.sd.VAE,
    face: FaceEmbeds,
    width: int,
    height: int,
    strength: float = 1.0,
    encoding: str = "sample",
    seed: int = 0,
) -> tuple[list, list]:
    """Add a face to both prompts; the key points are drawn where they are in the aligned picture.

    Raises:
        FileNotFoundError: the face model lacked a network for the identity.
        ValueError: see `condition_prompts`.
    """
    points = draw_key_points(face.aligned_points, face.picture.shape[2], face.picture.shape[1])
    return condition_prompts(
        positive,
        negative,
        vae,
        face.picture,
        points,
        face.identity,
        face.hidden,
        width,
        height,
        strength,
        encoding,
        seed,
    )
