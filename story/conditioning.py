"""Panels of a story -> CONDITIONING, one panel or a batch of panels with a prompt each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.model_patcher
import comfy.sd
import torch

from ..faces.class_tokens import TRIGGER
from ..faces.delayed_merge import delayed
from .lines import find_tags
from .script import Panel, Story


@dataclass(frozen=True)
class Identity:
    """What a story's characters look like in pictures, for PhotoMaker.

    Args:
        photomaker: PHOTOMAKER.
        images: (N, H, W, 3): all of the one character without a name, or one of each named character in their order.
        face_embeds: (N, 512) for PhotoMaker v2.
        has_face: (N,) False where a picture has no face.
        merge_start: share of the steps after which the person joins.
    """

    photomaker: object
    images: torch.Tensor
    face_embeds: torch.Tensor | None = None
    has_face: torch.Tensor | None = None
    merge_start: float = 0.2

    def check(self, story: Story) -> None:
        """Refuse pictures and descriptions that do not fit each other.

        Raises:
            ValueError: another number of pictures than named characters, or a description without the trigger word.
        """
        if story.named and len(self.images) != len(story.characters):
            raise ValueError(
                f"There are {len(self.images)} face pictures for {len(story.characters)} characters. Give one picture "
                "per character, in the order of the characters text."
            )
        for character in story.characters:
            if f" {TRIGGER}" not in f" {character.description}":
                raise ValueError(
                    f"Characters, line {character.line}: {character.description!r} has no trigger word. Write "
                    f"'{TRIGGER}' after the word for the person, such as 'a man {TRIGGER}'."
                )


def encode_text(clip: comfy.sd.CLIP, text: str, width: int, height: int) -> list:
    """CONDITIONING of a text with SDXL's size conditioning (pixels), which other models ignore."""
    entries = clip.encode_from_tokens_scheduled(clip.tokenize(text))
    return [_sized(entry, width, height) for entry in entries]


def check_sides(width: int, height: int) -> None:
    """Raise ValueError unless both sides of a picture are multiples of 8 pixels, which one latent pixel stands for."""
    for name, side in (("width", width), ("height", height)):
        if side < 8 or side % 8:
            below = max(8, side // 8 * 8)
            raise ValueError(f"{name} {side} is not a multiple of 8. Use {below} or {below + 8}.")


def check_encoder(model: comfy.model_patcher.ModelPatcher, prompt: list) -> None:
    """Raise ValueError when a CONDITIONING comes from the text encoder of another kind of model."""
    (states, options), network = prompt[0], model.model
    width = network.model_config.unet_config.get("context_dim")
    lacks_pooled = network.adm_channels and options.get("pooled_output") is None
    if isinstance(width, int) and states.shape[-1] != width or lacks_pooled:
        found = f"{states.shape[-1]} values per token" + (" and no summary of the text" if lacks_pooled else "")
        raise ValueError(
            f"The CLIP belongs to another model: it gives {found}, but the MODEL needs {width} values"
            f"{' and a summary' if network.adm_channels else ''}. Connect the MODEL and the CLIP of one checkpoint."
        )


def encode_panel(
    clip: comfy.sd.CLIP,
    story: Story,
    panel: Panel,
    width: int,
    height: int,
    identity: Identity | None = None,
    sigmas: torch.Tensor | None = None,
) -> list:
    """CONDITIONING of a panel; with an identity, the person joins after the first of the steps of `sigmas`.

    Raises:
        ValueError: naming the panel; see `encode_tensors`.
    """
    if identity is None or not panel.characters:
        return encode_text(clip, story.prompt(panel), width, height)
    from ..faces.photomaker import encode_tensors  # stories without people's pictures do not need PhotoMaker

    pictures = _pictures_of(story, panel, len(identity.images))
    chosen = [picture for share in pictures for picture in share]
    try:
        found = encode_tensors(
            identity.photomaker,
            clip,
            identity.images[chosen],
            story.prompt(panel),
            face_embeds=_rows(identity.face_embeds, chosen),
            has_face=_rows(identity.has_face, chosen),
            counts=[len(share) for share in pictures],
        )
    except ValueError as error:
        raise ValueError(f"Panels, line {panel.line}: {error}") from error
    text_only = _sized([found.text_only, found.text_only_options], width, height)
    merged = _sized([found.merged, found.merged_options], width, height)
    return delayed(text_only, merged, identity.merge_start, sigmas)


def _pictures_of(story: Story, panel: Panel, pictures: int) -> list[list[int]]:
    """Which pictures belong to each trigger word of a panel, in the order of the text."""
    if not story.named:
        return [list(range(pictures))]
    order = [character.name for character in story.characters]
    return [[order.index(name)] for name, *_ in find_tags(panel.text, f"Panels, line {panel.line}")]


def _rows(tensor: torch.Tensor | None, rows: list[int]) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


def _sized(entry: list, width: int, height: int) -> list:
    size = {"width": width, "height": height, "target_width": width, "target_height": height}
    return [entry[0], {**entry[1], **size}]


def batch(conditionings: Sequence[list]) -> list:
    """One CONDITIONING whose batch has an entry of each; texts of several lengths are repeated to a common one.

    Repeating keys and values as a whole changes nothing in attention.

    Raises:
        ValueError: conditionings of different numbers of entries.
    """
    if len({len(conditioning) for conditioning in conditionings}) != 1:
        raise ValueError(
            "Panels of one batch have conditionings with different numbers of entries, as after Conditioning "
            "(Combine). Draw these panels apart."
        )
    return [_batch_entry(entries) for entries in zip(*conditionings)]


def _batch_entry(entries: Sequence[list]) -> list:
    length = math.lcm(*(entry[0].shape[1] for entry in entries))
    text = torch.cat([entry[0].repeat(1, length // entry[0].shape[1], 1) for entry in entries])
    options = dict(entries[0][1])
    pooled = [entry[1].get("pooled_output") for entry in entries]
    if all(isinstance(vector, torch.Tensor) for vector in pooled):
        options["pooled_output"] = torch.cat(pooled)
    return [text, options]
