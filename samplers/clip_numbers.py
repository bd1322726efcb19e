"""Which clips of a batch a run makes: the pictures that go with them follow from it.

A batch of clips has its pictures in turn, and ComfyUI's Latent From Batch takes clips out of it. ComfyUI tells samplers
nothing about that but the noise, which is the one that the clip had in the whole batch.
"""

from collections.abc import Sequence

import comfy.sample
import torch

# The attribute with which this pack's NOISE objects sign what they draw.
NUMBERS = "consistent_video_clip_numbers"


def sign(noise: torch.Tensor, latent: dict) -> torch.Tensor:
    """Note on noise for a LATENT which clips of a batch it belongs to; returns it."""
    setattr(noise, NUMBERS, list(latent.get("batch_index") or range(len(noise))))
    return noise


def clip_numbers(noise: torch.Tensor, seed: int | None, most: int) -> list[int]:
    """The numbers of the clips that noise (B, C, F, h, w) belongs to; those of a whole batch where it cannot be told.

    Args:
        seed: of the run, from which ComfyUI has drawn the noise.
        most: clips to look at.
    """
    signed = getattr(noise, NUMBERS, None)
    if signed is not None:
        return signed
    whole = list(range(len(noise)))
    if seed is None or not noise.any():
        return whole
    drawn = comfy.sample.prepare_noise(noise[:1], seed, list(range(most)))
    found = [_first_equal(clip, drawn) for clip in noise.to(drawn)]
    distinct = None not in found and len(set(found)) == len(found)
    return found if distinct else whole


def _first_equal(clip: torch.Tensor, drawn: torch.Tensor) -> int | None:
    return next((number for number, other in enumerate(drawn) if torch.equal(clip, other)), None)


def rows_of_clips(rows: torch.Tensor, numbers: Sequence[int]) -> torch.Tensor:
    """The rows (N, ...) of pictures that go with clips by number, (B, ...): the pictures in turn."""
    return rows if rows.shape[0] == 1 else rows[[number % rows.shape[0] for number in numbers]]
