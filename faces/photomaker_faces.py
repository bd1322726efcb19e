"""Face embeddings for PhotoMaker, from a face model or from embeddings made before."""

import torch

from .embeddings import FaceEmbeds, photomaker_embeddings
from .face_model import FaceModel


def faces_for_photomaker(
    photomaker: object,
    images: torch.Tensor | None,
    face_model: FaceModel | None,
    face_embeds: FaceEmbeds | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Embeddings (N, 512) and which of the N pictures show a face (N,); both None where the version needs none.

    Raises:
        ValueError: no pictures, both sources of embeddings, or embeddings without an identity or of another number of
            pictures.
        FileNotFoundError, NoFaceError: see `photomaker_embeddings`.
    """
    if images is None:
        raise ValueError("PhotoMaker needs pictures of the person: connect them as images.")
    if getattr(photomaker, "version", "v1") != "v2" or (face_model is None and face_embeds is None):
        return None, None
    if face_embeds is not None:
        if face_model is not None:
            raise ValueError("Connect either face_model or face_embeds, not both.")
        if face_embeds.embedding is None:
            raise ValueError(
                "The face embeds hold no identity, because the face model had no recognition network. Load a face "
                "model with one (antelopev2 or buffalo_l)."
            )
        if len(face_embeds.embedding) != len(images):
            raise ValueError(
                f"The face embeds are of {len(face_embeds.embedding)} picture(s), but there are {len(images)} images. "
                "Connect face_model instead, which looks at every image."
            )
        return face_embeds.embedding, None
    found, kept = photomaker_embeddings(face_model, images)
    embeddings = found.new_zeros(len(images), found.shape[1])
    embeddings[kept] = found
    shown = torch.zeros(len(images), dtype=torch.bool)
    shown[kept] = True
    return embeddings, shown
