"""What a scene is given: checkpoints, noise, a place for its results. Modules `scenes_*.py` add the scenes."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from consistent_video.loaders import checkpoint
from consistent_video.loaders.families import FAMILIES
from consistent_video.samplers import reference, schedules
from native_sampling import conditioning, sample

from . import waits
from .modes import Mode

FOLDERS = {
    "modelscope": "text-to-video-ms-1.7b",
    "i2vgenxl": "i2vgen-xl",
    "consisti2v": "ConsistI2V",
    "consisid": "ConsisID-preview",
}
STEPS = 2
SCENES: dict[str, Callable[["Stage"], None]] = {}


def scene(run: Callable[["Stage"], None]) -> Callable[["Stage"], None]:
    """Decorator: add a function to the scenes, under its name."""
    SCENES[run.__name__] = run
    return run


class Stage:
    """Checkpoints and results of the scenes of one process.

    Args:
        models: ComfyUI's models folder with the tiny checkpoints.
        mode: what ComfyUI was started as.

    Attributes:
        values: name -> tensor on the CPU, in float32.
        waits: name -> places where the host waited in one sampling step.
    """

    def __init__(self, models: Path, mode: Mode) -> None:
        self.models = models
        self.mode = mode
        self.values: dict[str, torch.Tensor] = {}
        self.waits: dict[str, Counter] = {}
        self._loaded: dict[str, tuple] = {}

    def folder(self, family: str) -> Path:
        """The checkpoint of a family of `FOLDERS`."""
        return self.models / "diffusers" / FOLDERS[family]

    def load(self, family: str) -> tuple:
        """MODEL, CLIP and VAE, by the loaders of the pack."""
        if family not in self._loaded:
            self._loaded[family] = checkpoint.load_folder(FAMILIES[family], self.folder(family), self.mode.weight_dtype)
        return self._loaded[family]

    def forget(self) -> None:
        """Let go of all checkpoints."""
        self._loaded.clear()

    def texts(self, family: str, *prompts: str) -> list[list]:
        """CONDITIONING of prompts."""
        return [conditioning(self.load(family)[1], prompt) for prompt in prompts]

    def keep(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Remember a result; returns it."""
        self.values[name] = value.detach().to("cpu", torch.float32).clone()
        return value

    def sample(self, name: str, model, texts, noise: torch.Tensor, sampler=None, steps: int = STEPS, **settings):
        """Latents of a run over the published schedule, with the published sampler unless told otherwise; remembered.

        The waits of the run's last step are remembered under the same name.
        """
        sampler = reference.reference_sampler() if sampler is None else sampler
        sigmas = schedules.reference_sigmas(model.model.scheduler_config, steps)
        self.waits[name], result = waits.per_step(
            lambda callback: sample(model, *texts, noise, sampler, sigmas, callback=callback, **settings)
        )
        return self.keep(name, result)


def noise_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Seeded noise of the CPU."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pictures_of(*shape: int, seed: int = 1) -> torch.Tensor:
    """Seeded values between 0 and 1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))
