"""Pictures -> what the generating models are told about a face: for ConsisID and for PhotoMaker v2."""

from dataclasses import dataclass

import numpy as np
import torch

from .alignment import PORTRAIT_BORDER, PORTRAIT_SIDE, PORTRAIT_TEMPLATE, move_points, similarity_transform, warp
from .detection import ADVICE, Face, NoFaceError, detect_with_retries, largest_first, overlap, require_face
from .face_model import FaceModel
from .parsing import FaceOnWhite, channels_first, face_on_white
from .pictures import limit_long_side, to_image, to_picture, to_results
from .retinaface import robust_portrait

# ConsisID's limit of a picture's longer side.
LONG_SIDE = 1024
SELECTIONS = ("first", "largest")
NEEDED_BY_CONSISID = ("recogniser", "parser", "vision")


@dataclass(frozen=True, eq=False)
class FaceEmbeds:
    """What one picture of a face gives: FACE_EMBEDS.

    Attributes:
        picture: IMAGE (1, H, W, 3) that ConsisID's clip starts from: the aligned face on white, or, without alignment,
            the picture itself.
        points: (5, 2) key points in the source picture after its longer side was limited to 1024.
        aligned_points: (5, 2) the same in `picture`.
        embedding: (1, 512) ArcFace embedding, not normalised; None without a recogniser.
        vision: (1, 768) L2-normalised EVA02-CLIP embedding; None without the tower or the parser.
        hidden: five EVA02-CLIP states (1, 577, 1024); empty without the tower or the parser.
        missing: what a face model lacked -> where to get it.
    """

    picture: torch.Tensor
    points: np.ndarray
    aligned_points: np.ndarray
    embedding: torch.Tensor | None
    vision: torch.Tensor | None
    hidden: list[torch.Tensor]
    missing: dict[str, str]

    @property
    def identity(self) -> torch.Tensor:
        """ConsisID's `id_cond` (1, 1280): [ArcFace 512 ; EVA02-CLIP 768].

        Raises:
            FileNotFoundError: the face model lacked a network for it.
        """
        if self.embedding is None or self.vision is None:
            raise FileNotFoundError(
                "These face embeds hold the aligned picture and the key points but no identity: ConsisID needs the "
                f"published face networks. {' '.join(self.missing.values())}".strip()
            )
        return torch.cat([self.embedding, self.vision], dim=-1)


@dataclass(frozen=True, eq=False)
class _Portrait:
    """A crop of 512 x 512 pixels and the key points in it."""

    crop: np.ndarray
    points: np.ndarray


def encode_face(model: FaceModel, image: torch.Tensor, align: bool = True) -> FaceEmbeds:
    """Everything that ConsisID takes from a picture of a person, whose largest face is meant.

    The steps are those of diffusers' `process_face_embeddings_infer`, except that the aligned crop shows the same face
    as the embedding (there: the one nearest to the middle).

    Args:
        image: IMAGE of one picture, any size.
        align: False if the picture already is a portrait that is to be used as it is; a square is cut from its middle
            for the vision tower.

    Raises:
        NoFaceError: no face was found.
        ValueError: not one picture of finite values.
    """
    picture = limit_long_side(to_picture(image), LONG_SIDE)
    with model.in_use():
        found = largest_first(model.detector.detect(picture, model.detector.sizes[0]))
        portraits = largest_first(model.aligner.detect(picture)) if model.aligner else []
        faces = found or portraits or largest_first(detect_with_retries(model.detector, picture))
        face = require_face(faces, "the picture", picture)
        portrait = _portrait(picture, face, portraits)
        embedding = None
        if model.recogniser is not None:
            # What only the aligner found is recognised in its crop, as the reference does.
            only_portrait = not found and bool(portraits)
            values = (
                model.recogniser.embed_crop(portrait.crop) if only_portrait else model.recogniser.embed(picture, face)
            )
            embedding = to_results(torch.from_numpy(values).float()).unsqueeze(0)
    shown, seen = _shown_and_seen(model, picture, portrait, align)
    vision, hidden = None, []
    if model.vision is not None and seen is not None:
        pooled, hidden = model.vision.encode(seen)
        vision = pooled / pooled.norm(dim=1, keepdim=True)
    missing = {part: text for part, text in model.missing.items() if part in NEEDED_BY_CONSISID}
    points = portrait.points if align else face.points
    return FaceEmbeds(shown, face.points, points, embedding, vision, hidden, missing)


def photomaker_embeddings(
    model: FaceModel, images: torch.Tensor, select: str = "first"
) -> tuple[torch.Tensor, list[int]]:
    """Raw ArcFace embeddings for PhotoMaker v2, whose checkpoint was trained with those of buffalo_l.

    Sizes are tried from 640 down to 256. Pictures without a face are left out of both results.

    Args:
        images: IMAGE (B, H, W, C).
        select: which of several faces counts: "first" (the most certain one, as published) or "largest".

    Returns:
        Embeddings (K, 512) and the indices of the K pictures they belong to.

    Raises:
        FileNotFoundError: the face model has no recogniser.
        NoFaceError: no picture shows a face.
        ValueError: unknown selection, or values that are not numbers.
    """
    if select not in SELECTIONS:
        raise ValueError(f"Unknown selection of faces {select!r}. Choose one of: {', '.join(SELECTIONS)}.")
    recogniser = model.require_recogniser()
    embeddings, kept = [], []
    with model.in_use():
        for index, image in enumerate(images):
            picture = to_picture(image)
            faces = detect_with_retries(model.detector, picture)
            if faces:
                face = largest_first(faces)[0] if select == "largest" else faces[0]
                embeddings.append(to_results(torch.from_numpy(recogniser.embed(picture, face)).float()))
                kept.append(index)
    if not kept:
        raise NoFaceError(f"No face was found in any of the {len(images)} pictures. {ADVICE}")
    return torch.stack(embeddings), kept


def _portrait(picture: np.ndarray, face: Face, portraits: list[Face]) -> _Portrait:
    """The 512 crop of a face; by the aligner's key points if it found the same face, else by the detector's."""
    same = [other for other in portraits if overlap(face.box, other.box[None])[0] > 0]
    if same:
        best = max(same, key=lambda other: overlap(face.box, other.box[None])[0])
        crop, matrix = robust_portrait(picture, best.points)
        return _Portrait(crop, move_points(best.points, matrix))
    matrix = similarity_transform(face.points, PORTRAIT_TEMPLATE)
    crop = warp(picture, matrix, PORTRAIT_SIDE, PORTRAIT_BORDER)
    return _Portrait(crop, move_points(face.points, matrix))


def _shown_and_seen(
    model: FaceModel, picture: np.ndarray, portrait: _Portrait, align: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The IMAGE for the clip's first frame, and the square pictures (1, 3, S, S) for the vision tower.

    Without a parser the first is the crop with its background, and there is none for the tower.
    """
    if not align:
        return to_image(picture), channels_first(_middle_square(picture))
    if model.parser is None:
        return to_image(portrait.crop), None
    cut: FaceOnWhite = face_on_white(portrait.crop, model.parser.labels(portrait.crop))
    return to_results(cut.color.movedim(1, -1)), cut.grey


def _middle_square(picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return picture[top : top + side, left : left + side]
