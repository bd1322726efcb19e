"""What a saved network says about itself: its configuration, schedule and latent scale, for loading it again.

ComfyUI's Save Model and Save Checkpoint write tensors only, and the shapes of a network do not tell its number of
heads, its schedule or whether it reads key points. So the description is a tensor too: JSON in UTF-8, as bytes.
"""

import json
from collections.abc import Mapping

import torch

KEY = "consistent_video.description"
VERSION = 1


def to_tensor(family: str, network: Mapping, scheduler: Mapping, latent_factors: Mapping) -> torch.Tensor:
    """A description as bytes (N,).

    Args:
        family: name of the family.
        network: fields of its config.json.
        scheduler: diffusers scheduler configuration.
        latent_factors: arguments of the family's latent format.
    """
    content = {
        "version": VERSION,
        "family": family,
        "network": dict(network),
        "scheduler": dict(scheduler),
        "latent_factors": dict(latent_factors),
    }
    text = json.dumps(content, default=list)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def from_tensor(described: torch.Tensor) -> dict:
    """The content of a description.

    Raises:
        ValueError: it cannot be read, or is of another version.
    """
    content = json.loads(bytes(described.to(torch.uint8).tolist()).decode())
    parts = ("network", "scheduler", "latent_factors")
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise ValueError(f"its description is not of version {VERSION}")
    if not all(isinstance(content.get(part), dict) for part in parts):
        raise ValueError(f"its description lacks one of {', '.join(parts)}")
    return content
