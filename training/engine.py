"""The loop of a run, over accelerate: one process or many, on one machine or many (DDP, FSDP)."""

import importlib.util
import logging
import math
import os
import pickle
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from torch.utils.data import Dataset

from . import checkpoints
from .clips import Sample, SampleNumbers, SkippedClips, loader
from .progress import Report, StopSignal
from .settings import RunSettings
from .task import Task, Validation

# The other processes wait for as long while one of them draws validation clips or writes a checkpoint.
PATIENCE = timedelta(hours=6)

# What reading a damaged state may raise.
DAMAGES = (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError, SafetensorError)


class NotFinite(ValueError):
    """The loss or its gradient is no number any more."""


def start(settings: RunSettings) -> Accelerator:
    """Join the other processes of the run.

    Raises:
        ImportError: the tracker's package is not installed.
        ValueError: nothing can be written to the output folder.
    """
    if settings.tracker != "none" and importlib.util.find_spec(settings.tracker) is None:
        raise ImportError(
            f"The tracker {settings.tracker} is not installed. Install it (python -m pip install {settings.tracker}), "
            "or set tracker to none."
        )
    _make_writable(settings.output)
    folders = ProjectConfiguration(project_dir=str(settings.output), logging_dir=str(settings.output / "logs"))
    return Accelerator(
        gradient_accumulation_steps=settings.accumulation,
        mixed_precision="no" if settings.mixed_precision == "fp32" else settings.mixed_precision,
        log_with=None if settings.tracker == "none" else settings.tracker,
        project_config=folders,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )


def _make_writable(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"output: the folder {output} cannot be made ({error}). Choose another.") from error
    if not os.access(output, os.W_OK):
        raise ValueError(f"output: nothing can be written to the folder {output}. Choose another.")


class Run:
    """A task under way.

    Args:
        task: what is trained.
        dataset: gives the `Sample` of a number.
        accelerator: of `start`.
        trainer: name of the trainer, kept with the checkpoints.

    Raises:
        ValueError: the checkpoint to continue from is of another trainer, of other trained parameters, or damaged; or
            settings that do not go together.
    """

    def __init__(self, task: Task, dataset: Dataset, accelerator: Accelerator, trainer: str):
        self.task, self.dataset, self.accelerator = task, dataset, accelerator
        self.settings = settings = task.settings
        self.folder = settings.output / "checkpoints"
        trained = [parameter for parameter in task.network.parameters() if parameter.requires_grad]
        # Counted here: FSDP splits them below.
        sizes = (sum(map(torch.numel, parameters)) for parameters in (task.network.parameters(), trained))
        self.traits = checkpoints.Traits(trainer, settings.ema, *sizes)
        optimizer = torch.optim.AdamW(
            trained,
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            eps=settings.epsilon,
        )
        scheduler = get_scheduler(
            settings.schedule, optimizer, num_warmup_steps=settings.warmup_steps, num_training_steps=settings.steps
        )
        self.network, self.optimizer, self.scheduler = accelerator.prepare(task.network, optimizer, scheduler)
        self.ema = None
        if settings.ema:
            if accelerator.distributed_type == DistributedType.FSDP:
                raise ValueError("ema does not work with FSDP, which splits the weights. Set ema to false, or use DDP.")
            self.ema = EMAModel(self.network.parameters(), decay=settings.ema_decay)
            accelerator.register_for_checkpointing(self.ema)
        self.step = self.samples = 0
        self._resume()

    def train(self) -> None:
        """Train until `settings.steps`, or until the run is told to stop; both end with a checkpoint.

        Raises:
            NotFinite: the loss or its gradient is no number any more.
        """
        settings = self.settings
        if self.step >= settings.steps:
            logging.info("This run has made its %d steps. Raise steps to go on.", self.step)
            return
        self.task.network.train()
        skipped = SkippedClips(settings.output / "skipped_clips.txt")
        with StopSignal() as stop, Report(self.accelerator, settings, self.step) as report:
            samples, finished = self._samples(), False
            while not finished:
                loss, norm, rate = self._step(samples, skipped)
                # One answer for all processes: they save and validate together.
                loss, stopping = self._agree(loss, stop.asked)
                report.step(self.step, loss=loss, gradient_norm=norm, learning_rate=rate, skipped=skipped.count)
                self._require_finite(loss, norm)
                finished = stopping or self.step == settings.steps
                if finished or self.step % settings.save_every == 0:
                    self._save()
                if not stopping and settings.validate_every and self.step % settings.validate_every == 0:
                    report.validated(self.step, self._validate())
        saved = self.folder / checkpoints.folder_name(self.step)
        logging.info("Stopped after step %d: %s. %d clips could not be used.", self.step, saved, skipped.count)

    def _samples(self) -> Iterator[list[Sample]]:
        """The batches of this process, from where the run is."""
        settings, processes = self.settings, self.accelerator.num_processes
        count = (settings.steps - self.step) * settings.accumulation
        numbers = SampleNumbers(settings.batch_size, processes, self.accelerator.process_index, self.samples, count)
        return iter(loader(self.dataset, numbers, settings.data.workers))

    def _step(self, samples: Iterator[list[Sample]], skipped: SkippedClips) -> tuple[torch.Tensor, float, float]:
        """Change the weights once; returns the mean loss of this process, the gradient's length, the learning rate."""
        accelerator, settings = self.accelerator, self.settings
        total = torch.zeros((), device=accelerator.device)
        for _ in range(settings.accumulation):
            batch = next(samples)
            for sample in batch:
                skipped.add(sample.skipped)
            with accelerator.accumulate(self.network):
                loss = self.task.loss(self.network, batch)
                total += loss.detach() / settings.accumulation
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.network.parameters(), settings.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        rate = self.optimizer.param_groups[0]["lr"]
        if not accelerator.optimizer_step_was_skipped:
            self.scheduler.step()
            self.task.after_step(self.network)
            if self.ema is not None:
                self.ema.step(self.network.parameters())
        self.step += 1
        self.samples += settings.accumulation * settings.batch_size * accelerator.num_processes
        return total, float(norm), rate

    def _agree(self, loss: torch.Tensor, stop: bool) -> tuple[float, bool]:
        """The mean loss of all processes, and whether one of them was told to stop."""
        values = torch.stack((loss.float(), loss.new_tensor(float(stop)).float()))
        mean, stopping = self.accelerator.reduce(values, "mean").tolist()
        return mean, stopping > 0

    def _require_finite(self, loss: float, norm: float) -> None:
        """End the run before weights that are no numbers are saved; fp16 leaves out a step whose gradient is too long.

        Raises:
            NotFinite: see above.
        """
        if not math.isfinite(loss) or not (math.isfinite(norm) or self.accelerator.optimizer_step_was_skipped):
            raise NotFinite(
                f"The loss of step {self.step} is {loss}, its gradient {norm} long. Start again with a lower "
                "learning_rate, or with mixed_precision bf16 or fp32: the run goes on from its last checkpoint."
            )

    def _weights(self) -> dict[str, torch.Tensor]:
        """All weights of the network, or their moving average, on the CPU; empty but on the main process."""
        if self.ema is not None:
            self.ema.store(self.network.parameters())
            self.ema.copy_to(self.network.parameters())
        weights = self.accelerator.get_state_dict(self.network)
        if self.accelerator.is_main_process:
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
        if self.ema is not None:
            self.ema.restore(self.network.parameters())
        return weights if self.accelerator.is_main_process else {}

    def _save(self) -> None:
        """Write a checkpoint: what the graph loads, and what continuing needs."""
        weights, main = self._weights(), self.accelerator.is_main_process
        if main:
            checkpoints.begin(self.folder, self.step)
        self.accelerator.wait_for_everyone()
        unfinished = checkpoints.unfinished(self.folder, self.step)
        self.accelerator.save_state(str(unfinished / checkpoints.STATE))
        self.accelerator.wait_for_everyone()
        if main:
            self.task.save(unfinished, weights)
            progress = checkpoints.Progress(self.step, self.samples, self.traits)
            checkpoints.finish(unfinished, progress, self.settings.keep)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one, with the settings of this run."""
        found = checkpoints.complete(self.folder)
        if not found:
            return
        progress = checkpoints.read_progress(found[-1], self.traits)
        try:
            self.accelerator.load_state(str(found[-1] / checkpoints.STATE))
        except DAMAGES as error:
            raise ValueError(checkpoints.damaged(found[-1], error)) from error
        self.step, self.samples = progress.step, progress.samples
        # accelerate counts batches from there on, and the number that makes a step may be another one now.
        self.accelerator.step = 0
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
        self._apply_optimizer_settings()
        logging.info("Continuing from %s.", found[-1])

    def _apply_optimizer_settings(self) -> None:
        """Give the optimizer, whose loaded state has those of the checkpoint, the values of this run's settings."""
        settings, scheduler = self.settings, self.scheduler.scheduler
        scheduler.base_lrs = [settings.learning_rate for _ in scheduler.base_lrs]
        for group, factor in zip(self.optimizer.param_groups, scheduler.lr_lambdas):
            group.update(
                initial_lr=settings.learning_rate,
                lr=settings.learning_rate * factor(scheduler.last_epoch),
                betas=settings.betas,
                weight_decay=settings.weight_decay,
                eps=settings.epsilon,
            )

    def _validate(self) -> Validation | None:
        """Validate on the main process, with the weights that a checkpoint would hold."""
        weights, result = self._weights(), None
        if self.accelerator.is_main_process:
            folder = self.settings.output / "validation" / checkpoints.folder_name(self.step)
            folder.mkdir(parents=True, exist_ok=True)
            result = self.task.validate(weights, folder)
        self.accelerator.wait_for_everyone()
        return result
