"""Pictures of a person and a text with a trigger word -> CONDITIONING in which that person is the class word."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import comfy.sd
import comfy.sdxl_clip
import torch

from ..models.photomaker import PhotoMaker
from ..models.photomaker_picture import normalise
from .class_tokens import TRIGGER, expand, read_prompt, room, without_triggers
from .delayed_merge import delayed

SIZE_OPTIONS = ("width", "height", "crop_w", "crop_h", "target_width", "target_height")


class CorePhotoMaker:
    """The object of ComfyUI's own PhotoMaker loader (v1), with the attributes of ours.

    Raises:
        ValueError: the object is something else.
    """

    version, tokens_per_picture, face_width = "v1", 1, None
    image_size = 224

    def __init__(self, network: object) -> None:
        parts = ("load_device", "fuse_module", "visual_projection_2")
        if not callable(network) or not all(hasattr(network, part) for part in parts) or _is_v2(network):
            raise ValueError(
                f"The PHOTOMAKER input is a {type(network).__module__}.{type(network).__qualname__}, which this node "
                "cannot use. Load the file with Load PhotoMaker of this pack, or with ComfyUI's own node (v1 only)."
            )
        self.network, self.load_device = network, network.load_device
        self.width = network.fuse_module.layer_norm.normalized_shape[0]

    def __call__(
        self,
        id_pixel_values: torch.Tensor,
        prompt_embeds: torch.Tensor,
        class_tokens_mask: torch.Tensor,
        face_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As of `PhotoMaker.__call__`."""
        updated = self.network(
            id_pixel_values=id_pixel_values.to(self.load_device),
            prompt_embeds=prompt_embeds.to(self.load_device, copy=True),  # it writes into them
            class_tokens_mask=class_tokens_mask.to(self.load_device),
        )
        return updated.to(prompt_embeds.device)


@dataclass(frozen=True)
class Encoded:
    """Text embeddings (1, 77, width) and the options beside them ("pooled_output" (1, P) among others).

    `merged` holds the person, with the pooled output of the text whose class word is repeated; `text_only` is the text
    without trigger words.
    """

    merged: torch.Tensor
    merged_options: dict
    text_only: torch.Tensor
    text_only_options: dict


def encode(
    photomaker: PhotoMaker,
    clip: comfy.sd.CLIP,
    images: torch.Tensor,
    text: str,
    *,
    face_embeds: torch.Tensor | None = None,
    has_face: torch.Tensor | None = None,
    trigger: str | Sequence[str] = TRIGGER,
    counts: Sequence[int] | None = None,
    several: bool = False,
    merge_start: float = 0.2,
    sigmas: torch.Tensor | None = None,
    size_options: Mapping[str, int] | None = None,
) -> tuple[list, list]:
    """CONDITIONING with the person from `merge_start` on, and CONDITIONING of the text alone.

    Args:
        merge_start, sigmas: as of `delayed`.
        size_options: SDXL's size conditioning for both results, as of CLIPTextEncodeSDXL: width, height, crop_w,
            crop_h, target_width, target_height in pixels.
        others: as of `encode_tensors`.

    Raises:
        ValueError: as of `encode_tensors` and `delayed`, or an unknown size option.
    """
    sizes = dict(size_options or {})
    unknown = sorted(sizes.keys() - set(SIZE_OPTIONS))
    if unknown:
        raise ValueError(f"Unknown size options {', '.join(unknown)}. Expected some of {', '.join(SIZE_OPTIONS)}.")
    found = encode_tensors(
        photomaker,
        clip,
        images,
        text,
        face_embeds=face_embeds,
        has_face=has_face,
        trigger=trigger,
        counts=counts,
        several=several,
    )
    merged = [found.merged, {**found.merged_options, **sizes}]
    text_only = [found.text_only, {**found.text_only_options, **sizes}]
    return delayed(text_only, merged, merge_start, sigmas), [text_only]


def encode_tensors(
    photomaker: PhotoMaker,
    clip: comfy.sd.CLIP,
    images: torch.Tensor,
    text: str,
    *,
    face_embeds: torch.Tensor | None = None,
    has_face: torch.Tensor | None = None,
    trigger: str | Sequence[str] = TRIGGER,
    counts: Sequence[int] | None = None,
    several: bool = False,
) -> Encoded:
    """Text embeddings with the person in place of the class word, and those of the text alone.

    Args:
        photomaker: ours, or the object of ComfyUI's own loader (v1).
        clip: of an SDXL checkpoint.
        images: pictures of the person, (N, H, W, C) in 0..1, any size.
        text: has the trigger word directly after the class word: "a photo of a man img".
        face_embeds: (N, 512) recognition embeddings, not normalised, one per picture. Needed by v2, unused by v1.
        has_face: (N,), False where a picture has no face; v2 leaves out such a picture with its embedding.
        trigger, several: as of `read_prompt`. Several persons share all pictures unless `counts` is given.
        counts: pictures per person, in the order of the trigger words in the text; allows several persons.

    Raises:
        ValueError: no SDXL CLIP, unusable pictures or text, more pictures than the text has room for, no face
            embeddings or no face at all with v2, counts that do not match.
    """
    model = photomaker if isinstance(photomaker, PhotoMaker) else CorePhotoMaker(photomaker)
    check_clip(clip)
    pictures = normalise(images, model.image_size)
    prompt = read_prompt(clip.tokenizer, text, trigger, several or counts is not None)
    shares = pictures_per_person(len(images), prompt.persons, counts)
    faces = None
    if model.version == "v2":
        chosen, faces = faces_of(len(images), face_embeds, has_face)
        shares = [[picture for picture in share if chosen[picture]] for share in shares]
        _check_everyone_has_a_face(shares)
    check_room(shares, model.tokens_per_picture, room(clip.tokenizer))
    classes = expand(clip.tokenizer, prompt, [len(share) * model.tokens_per_picture for share in shares])
    merged, merged_options = _encode_tokens(clip, classes.tokens)
    text_only, text_only_options = _encode_tokens(clip, without_triggers(clip.tokenizer, prompt))
    for share, positions in zip(shares, classes.positions):
        mask = torch.zeros(merged.shape[:2], dtype=torch.bool)
        mask[:, positions] = True
        own_faces = None if faces is None else faces[share].unsqueeze(0)
        merged = model(pictures[share].unsqueeze(0), merged, mask, own_faces)
    return Encoded(merged, merged_options, text_only, text_only_options)


def read_counts(text: str) -> list[int] | None:
    """Pictures per person from numbers with commas between them; None for an empty text.

    Raises:
        ValueError: something else than numbers.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"pictures_per_person is {text!r}. Write numbers with commas between them, such as '2, 1'.")
    return [int(part) for part in parts] or None


def check_clip(clip: comfy.sd.CLIP) -> None:
    """Raise ValueError unless the CLIP has SDXL's two text encoders."""
    if not isinstance(clip.tokenizer, comfy.sdxl_clip.SDXLTokenizer):
        raise ValueError(
            f"PhotoMaker needs the CLIP of an SDXL checkpoint with its two text encoders, found one with a "
            f"{type(clip.tokenizer).__name__}. Connect the CLIP of the SDXL checkpoint loader."
        )


def pictures_per_person(pictures: int, persons: int, counts: Sequence[int] | None) -> list[list[int]]:
    """Indices of the pictures that belong to each person: all of them, or `counts` of them in turn.

    Raises:
        ValueError: counts that do not name every person, or do not add up to the pictures.
    """
    if counts is None:
        return [list(range(pictures)) for _ in range(persons)]
    if len(counts) != persons or min(counts) < 1 or sum(counts) != pictures:
        raise ValueError(
            f"The pictures per person are {', '.join(map(str, counts)) or 'empty'}, but there are {pictures} pictures "
            f"and {persons} trigger words in the text. Give one number of at least 1 per trigger word, in the order "
            "of the text, with the number of pictures as their sum."
        )
    starts = [sum(counts[:person]) for person in range(persons)]
    return [list(range(start, start + count)) for start, count in zip(starts, counts)]


def faces_of(
    pictures: int, face_embeds: torch.Tensor | None, has_face: torch.Tensor | None
) -> tuple[list[bool], torch.Tensor]:
    """Which pictures show a face, and the embeddings (N, 512).

    Raises:
        ValueError: no embeddings, or not one per picture.
    """
    if face_embeds is None:
        raise ValueError(
            "This is a PhotoMaker v2 file, which needs a face recognition embedding of every picture. Connect a face "
            "model (antelopev2 or buffalo_l), or use a PhotoMaker v1 file, which needs pictures only."
        )
    if face_embeds.ndim != 2 or len(face_embeds) != pictures:
        raise ValueError(
            f"There are {pictures} pictures, but the face embeddings have the shape {tuple(face_embeds.shape)}. Give "
            "one row per picture, in the same order."
        )
    if has_face is None:
        return [True] * pictures, face_embeds
    if tuple(has_face.shape) != (pictures,):
        raise ValueError(f"has_face has the shape {tuple(has_face.shape)}, expected ({pictures},): one per picture.")
    return has_face.tolist(), face_embeds


def check_room(shares: list[list[int]], tokens_per_picture: int, length: int) -> None:
    """Raise ValueError when the class tokens of all pictures do not fit into the `length` tokens of a text."""
    pictures = sum(map(len, shares))
    if pictures * tokens_per_picture > length:
        fit = length // tokens_per_picture
        uses = f" ({len(shares)} persons, so {fit // len(shares)} each)" if len(shares) > 1 else ""
        raise ValueError(
            f"{pictures} pictures need {pictures * tokens_per_picture} tokens, but a text has room for {length}. At "
            f"most {fit} pictures fit{uses}; 1 to 4 per person are usual."
        )


def _check_everyone_has_a_face(shares: list[list[int]]) -> None:
    if not all(shares):
        whose = f" of person {1 + shares.index([])}" if len(shares) > 1 else ""
        raise ValueError(
            f"No face was found in any picture{whose}. PhotoMaker v2 needs at least one: use pictures in which the "
            "face is larger and seen from the front."
        )


def _encode_tokens(clip: comfy.sd.CLIP, tokens: dict) -> tuple[torch.Tensor, dict]:
    options = clip.encode_from_tokens(tokens, return_pooled=True, return_dict=True)
    return options.pop("cond"), options


def _is_v2(network: object) -> bool:
    return hasattr(network, "qformer_perceiver")
