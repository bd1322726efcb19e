"""What a run tells while it runs: progress bar, curves, a file of numbers; and how it is told to stop."""

import json
import math
import signal

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .settings import RunSettings, yaml_text
from .task import Validation

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Notices SIGINT (Ctrl+C) and SIGTERM, so that a run can end with a checkpoint; the second one ends it at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        self._restore()

    def _notice(self, number, frame) -> None:
        self.asked = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Report:
    """Progress bar, tracker and `metrics.jsonl` of the main process; nothing on the others.

    Args:
        accelerator: with its tracker.
        settings: of the run, kept with the curves.
        step: where the run begins.
    """

    def __init__(self, accelerator: Accelerator, settings: RunSettings, step: int):
        self.accelerator, self.settings, self.first = accelerator, settings, step

    def __enter__(self) -> "Report":
        main = self.accelerator.is_main_process
        if self.settings.tracker != "none":
            config = {name: yaml_text(value) for name, value in self.settings.model_dump(mode="json").items()}
            self.accelerator.init_trackers("consistent_video", config=config)
        self._bar = tqdm(total=self.settings.steps, initial=self.first, unit="step", disable=not main)
        self._file = (self.settings.output / "metrics.jsonl").open("a", encoding="utf-8") if main else None
        return self

    def __exit__(self, *error) -> None:
        self._bar.close()
        if self._file is not None:
            self._file.close()
        self.accelerator.end_training()

    def step(self, step: int, **numbers: float) -> None:
        """Tell of a step of training."""
        self._bar.update()
        self._bar.set_postfix(loss=f"{numbers['loss']:.4g}", skipped=numbers["skipped"], refresh=False)
        self._log(step, numbers)

    def validated(self, step: int, validation: Validation | None) -> None:
        """Tell of a validation; None on the processes that had no part in it."""
        if validation is None:
            return
        self._log(step, {f"validation/{name}": number for name, number in validation.numbers.items()})
        pictures = {f"validation/{name}": _bytes(pictures) for name, pictures in validation.pictures.items()}
        for tracker in self.accelerator.trackers:
            # TensorBoard would take channels first
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images(pictures, step=step, **layout)

    def _log(self, step: int, numbers: dict[str, float]) -> None:
        if self._file is None or not numbers:
            return
        self.accelerator.log(numbers, step=step)
        finite = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()


def _bytes(pictures: torch.Tensor):
    """Pictures (N, H, W, 3) in 0..1 as 8-bit numpy arrays."""
    return (pictures * 255).round().clamp(0, 255).byte().cpu().numpy()
