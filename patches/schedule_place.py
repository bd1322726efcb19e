"""Where in its whole schedule a run begins and ends, told from its noise levels.

A run may be a part of a schedule: the last steps of it (denoise below 1) or one of the pieces that Split Sigmas makes.
Its first step is then not the first step of the picture. Whoever counts steps needs the place of the run; of the whole
schedule only the model's highest and lowest noise level are known, and that schedulers place their steps evenly in the
training timestep, in the logarithm of sigma, or in the seventh root of it (Karras).
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

KARRAS_RHO = 7
# A schedule may begin up to a step below the highest noise level, as ddim_uniform does. So much of a step more than a
# whole number of steps missing is rounding.
ROUNDING = 0.02
FIRST_ROUNDING = 1e-3


class Place(NamedTuple):
    """A run in its schedule.

    Args:
        before: steps of the schedule before the run.
        steps: of the whole schedule.
    """

    before: int
    steps: int


def place_of(model_sampling: torch.nn.Module, sigmas: Sequence[float]) -> Place:
    """The place of a run.

    Args:
        model_sampling: of the model.
        sigmas: n + 1 falling values; the last may be 0.

    Returns:
        Nothing before it, n steps, for every run from the start to the end of its schedule, and where the sigmas do not
        fall.
    """
    count = len(sigmas) - 1
    levels = [sigma for sigma in sigmas if sigma > 0]
    highest, lowest = float(model_sampling.sigma_max), float(model_sampling.sigma_min)
    if count < 1 or not levels or any(later >= earlier for earlier, later in pairwise(sigmas)):
        return Place(0, max(count, 0))
    measure = min(_measures(model_sampling), key=lambda measure: _unevenness([measure(level) for level in levels]))
    places = [measure(level) for level in levels]
    ends = measure(highest), measure(lowest)
    step = (places[0] - places[-1]) / (len(places) - 1) if len(places) > 1 else max(places[0] - ends[1], 0.0)
    if step <= 0:
        return Place(0, count)
    missing = (ends[0] - places[0]) / step
    before = math.floor(missing + ROUNDING) if missing >= 1 - FIRST_ROUNDING else 0
    finished = sigmas[-1] <= lowest * (1 - ROUNDING)
    after = 0 if finished else max(round((places[-1] - ends[1]) / step), 0) + 1
    return Place(before, before + count + after)


def nearest_step(sigmas: Sequence[float], level: float) -> int:
    """The step, 0..n - 1, of a run with n + 1 sigmas whose own sigma is nearest to one that a model is evaluated at."""
    return min(range(len(sigmas) - 1), key=lambda step: abs(sigmas[step] - level))


def _measures(model_sampling: torch.nn.Module) -> list[Callable[[float], float]]:
    """What is even along a schedule, as functions of sigma."""
    measures = [math.log, lambda sigma: sigma ** (1 / KARRAS_RHO)]
    table = getattr(model_sampling, "sigmas", None)
    if table is None or len(table) < 2:
        return measures
    table = table.detach().cpu().log().flatten()

    def timestep(sigma: float) -> float:
        """Between the timesteps of the table as ComfyUI goes, evenly in the logarithm of sigma."""
        level = torch.tensor(math.log(sigma), dtype=table.dtype)
        above = int(torch.searchsorted(table, level).clamp(1, len(table) - 1))
        low, high = table[above - 1].item(), table[above].item()
        return above - 1 + (level.item() - low) / max(high - low, 1e-12)

    return [timestep, *measures]


def _unevenness(places: list[float]) -> float:
    """How far the steps are from equal, as a share of them; 0 for one or two levels."""
    steps = [earlier - later for earlier, later in pairwise(places)]
    if len(steps) < 2:
        return 0.0
    mean = sum(steps) / len(steps)
    return max(abs(step - mean) for step in steps) / abs(mean) if mean else math.inf
