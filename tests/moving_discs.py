"""Clips whose middle does not follow from their ends by interpolation, and a vision tower that sees the difference."""

import math
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_clips import write_annotations, write_clip

FRAMES, SIDE = 8, 32
RADIUS = 0.2


def moving_disc(seed: int) -> torch.Tensor:
    """Frames (F, H, W, 3): a disc accelerates along an arc from one place to another, and takes on another colour.

    Places and colours at both ends are random; in between they follow from those at the ends.
    """
    draw = random.Random(seed)
    start, end = (torch.tensor([draw.uniform(0.2, 0.8) for _ in range(2)]) for _ in range(2))
    first, last = (torch.tensor([draw.uniform(0.2, 1.0) for _ in range(3)]) for _ in range(2))
    grid = torch.stack(torch.meshgrid(*(2 * [(torch.arange(SIDE) + 0.5) / SIDE]), indexing="ij"), dim=-1)
    frames = []
    for frame in range(FRAMES):
        time = frame / (FRAMES - 1)
        place = torch.lerp(start, end, time**3) - torch.tensor([0.3 * math.sin(math.pi * time), 0.0])
        colour = torch.lerp(first, last, time**0.4)
        inside = ((RADIUS - (grid - place).norm(dim=-1)) * SIDE).clamp(0, 1)
        frames.append(inside.unsqueeze(-1) * colour)
    return torch.stack(frames)


def write_discs(folder: Path, seeds: range) -> dict:
    """Clips of some seeds as files; returns their entry for `data.sources`."""
    rows = []
    for seed in seeds:
        write_clip(folder / f"{seed}.mp4", moving_disc(seed))
        rows.append({"file": f"{seed}.mp4", "text": "a disc"})
    annotations = write_annotations(folder / "annotations.jsonl", rows)
    return {"annotations": annotations, "folder": folder}


def sharpen_tower(folder: Path, seed: int = 0) -> None:
    """Give the vision tower of a tiny I2VGen-XL folder weights by which its embeddings tell pictures apart.

    Freshly made ones are so small that all pictures look the same to it.
    """
    path = folder / "image_encoder" / "model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in load_file(path).items():
        fan_in = value[0].numel() if value.ndim > 1 else 1
        state[key] = torch.randn(value.shape, generator=generator) / fan_in**0.5 if value.ndim > 1 else value
    save_file(state, path, metadata={"format": "pt"})
