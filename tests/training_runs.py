"""What the tests of training share: settings, clips made of numbers, runs in this process."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from consistent_video.training import engine
from consistent_video.training.clips import Sample
from consistent_video.training.settings import ConsistI2VSettings, RunSettings

FRAMES, SIDE = 3, 32


@pytest.fixture(autouse=True)
def inference():
    """Training needs gradients: takes the place of the fixture under which nodes are tested. Import it to use it."""
    yield


class NumberedClips(torch.utils.data.Dataset):
    """Clips of noise that follow from their number."""

    def __init__(self, frames: int = FRAMES, side: int = SIDE):
        self.frames, self.side = frames, side

    def __getitem__(self, number: int) -> Sample:
        generator = torch.Generator().manual_seed(number)
        frames = torch.rand(self.frames, self.side, self.side, 3, generator=generator)
        return Sample(number, frames, f"clip {number % 5}", 1 + number % 3, ())


def consisti2v_settings(output: Path, pretrained: Path, **changes) -> ConsistI2VSettings:
    """Settings of a small ConsistI2V run on the CPU; `changes` replace fields."""
    values = {
        "output": output,
        "pretrained": pretrained,
        "data": data_settings(),
        "steps": 10,
        "batch_size": 1,
        "learning_rate": 1e-3,
        "mixed_precision": "fp32",
        "save_every": 5,
        "validate_every": 0,
        "tracker": "none",
    }
    return ConsistI2VSettings(**{**values, **changes})


def data_settings(**changes) -> dict:
    """Settings of clips of `FRAMES` frames; `NumberedClips` are the clips unless the test says otherwise."""
    values = {"sources": [{"annotations": "none", "folder": "none"}], "frames": FRAMES, "workers": 0}
    return {**values, "width": SIDE, "height": SIDE, **changes}


def run_of(task, dataset=None, trainer: str = "consisti2v") -> engine.Run:
    """A run in this process, with its accelerator's state new."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return engine.Run(task, dataset or NumberedClips(), engine.start(task.settings), trainer)


def metrics(settings: RunSettings) -> list[dict]:
    """What a run wrote of its steps."""
    lines = (settings.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def losses(settings: RunSettings) -> list[float]:
    """Its loss, step by step."""
    return [row["loss"] for row in metrics(settings) if "loss" in row]
