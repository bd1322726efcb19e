"""The command line: `accelerate launch -m consistent_video_train TRAINER FILE.yaml [key=value ...]`."""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import engine
from .consisti2v import ConsistI2VTask
from .motion_predictor import MotionPredictorTask
from .settings import (
    ConsistI2VSettings,
    MotionPredictorSettings,
    RunSettings,
    describe,
    read_settings,
)
from .sources import open_dataset
from .task import Task

PROGRAM = "accelerate launch -m consistent_video_train"


@dataclass(frozen=True)
class Trainer:
    """What can be trained: its settings, what makes its task of them, and what it is for."""

    settings: type[RunSettings]
    task: Callable[[RunSettings], Task]
    purpose: str


TRAINERS = {
    "consisti2v": Trainer(ConsistI2VSettings, ConsistI2VTask, "ConsistI2V: first frame and text to clip"),
    "motion_predictor": Trainer(
        MotionPredictorSettings, MotionPredictorTask, "the motion predictor of transitions between two pictures"
    ),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a trainer.

    Args:
        arguments: of the command line; by default those of this process.

    Raises:
        SystemExit: arguments, settings, files or clips that cannot be used, with the reason.
    """
    parser = _parser()
    parsed = parser.parse_args(arguments)
    # ComfyUI has set up logging while it was imported.
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    trainer = TRAINERS[parsed.trainer]
    try:
        settings = read_settings(trainer.settings, parsed.file, parsed.overrides)
        accelerator = engine.start(settings)
        if not accelerator.is_main_process:
            logging.disable(logging.INFO)
        dataset = open_dataset(settings.data, settings.seed)
        run = engine.Run(trainer.task(settings), dataset, accelerator, parsed.trainer)
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"{error}\n")
    try:
        run.train()
    except engine.NotFinite as error:
        parser.exit(1, f"{error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description="Train networks of ComfyUI-ConsistentVideo.")
    trainers = parser.add_subparsers(dest="trainer", required=True, metavar="TRAINER")
    for name, trainer in TRAINERS.items():
        sub = trainers.add_parser(
            name,
            help=trainer.purpose,
            description=f"Train {trainer.purpose}.",
            epilog=_fields(trainer.settings),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("file", type=Path, metavar="FILE.yaml", help="settings of the run")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    return parser


def _fields(settings: type[RunSettings]) -> str:
    rows = [f"  {key}  ({default})\n      {meaning}" for key, default, meaning in describe(settings)]
    return "\n".join(["fields of the file, with their defaults:", *rows])
