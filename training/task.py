"""What the engine asks of a trainer."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from .clips import Sample
from .settings import RunSettings


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Args:
        numbers: by name.
        pictures: batches (N, H, W, 3) in 0..1 by name, to look at.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, torch.Tensor] = field(default_factory=dict)


class Task(Protocol):
    """One network and how it learns.

    Everything random must follow from `Sample.number`, see `randomness`: a run is then the same on any number of
    processes, and after an interruption.

    Args:
        network: what is trained, in float32 on the CPU; parameters that stay as they are do not require gradients.
        settings: of the run.
    """

    network: torch.nn.Module
    settings: RunSettings

    def loss(self, network: torch.nn.Module, samples: list[Sample]) -> torch.Tensor:
        """The mean loss of some samples, a scalar.

        Args:
            network: the trained network as accelerate wraps it; call it and nothing below it.
            samples: of one process.
        """

    def after_step(self, network: torch.nn.Module) -> None:
        """Called when the weights have changed, to keep parameters in their range."""

    def save(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Write what the graph loads into an existing folder; `weights` are the network's, all of them, by name."""

    def validate(self, weights: dict[str, torch.Tensor], folder: Path) -> Validation:
        """Measure or draw with some weights; may write files into the folder, which exists."""
