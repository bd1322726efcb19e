"""From the panels of a story to the transitions between them, and from their clips to one video.

As in StoryDiffusion (Zhou et al. 2024, arXiv 2405.01434, section 3.2): every pair of neighbouring panels is a clip of
its own, from the first panel to the second.
"""

import re
from collections.abc import Sequence

import torch

from ..faces.class_tokens import TRIGGER
from .script import Panel, Story


def neighbours(images: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Start and end pictures of the transitions between N panels: N - 1 of each.

    Args:
        images: (N, H, W, C).

    Returns:
        Pictures (1, H, W, C) that share the memory of `images`.

    Raises:
        ValueError: fewer than 2 panels.
    """
    if len(images) < 2:
        raise ValueError(
            f"There is a transition between two panels, but the batch has {len(images)}. Connect all panels of the "
            "story as one batch."
        )
    panels = list(images.split(1))
    return panels[:-1], panels[1:]


def prompts(panels: int, story: Story | None) -> list[str]:
    """A prompt per transition: what the first panel shows, then the second, in the wording of the story's style.

    PhotoMaker's trigger word, which other networks do not know, is left out. Without a story the prompts are empty.

    Args:
        panels: number of pictures.

    Raises:
        ValueError: the story has another number of panels.
    """
    if story is None:
        return [""] * (panels - 1)
    if len(story.panels) != panels:
        raise ValueError(
            f"The story has {len(story.panels)} panels, but there are {panels} pictures. Connect the pictures of all "
            "its panels, in their order, or leave the story unconnected."
        )
    texts = [_text(panel) for panel in story.panels]
    return [
        story.style.apply(first if first == second else f"{first}, then {second}")
        for first, second in zip(texts, texts[1:])
    ]


def _text(panel: Panel) -> str:
    return re.sub(rf"\s+{TRIGGER}\b", "", panel.prompt).rstrip(" ,.;")


def join(clips: Sequence[torch.Tensor]) -> torch.Tensor:
    """Clips one after the other, each without its last frame but the last one: the next clip begins with that panel.

    Args:
        clips: (F, H, W, C) of one size, on any device.

    Returns:
        (sum of F - (clips - 1), H, W, C), of the first one's type and device.

    Raises:
        ValueError: clips of several sizes, or one of a single frame that another follows.
    """
    first = clips[0]
    for number, clip in enumerate(clips, 1):
        if clip.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"Clip {number} has frames of {_size(clip)}, but clip 1 of {_size(first)}. Make all transitions with "
                "the same width and height."
            )
        if len(clip) < 2 <= len(clips):
            raise ValueError(
                f"Clip {number} has {len(clip)} frame, but a transition has at least 2. Connect the decoded clips of "
                "all transitions as a list."
            )
    return torch.cat([*(clip[:-1].to(first) for clip in clips[:-1]), clips[-1].to(first)])


def _size(clip: torch.Tensor) -> str:
    height, width, channels = clip.shape[1:]
    return f"{width}x{height} pixels and {channels} channels"
