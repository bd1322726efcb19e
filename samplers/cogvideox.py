"""The two samplers of CogVideoX's pipelines, and so of ConsisID's, as algorithms of `reference.ReferenceSampler`.

Both step a variance-preserving state x = sqrt(a) * x0 + sqrt(1 - a) * noise. They neither clip nor threshold x0,
whatever the scheduler configuration says. Which alpha a step arrives at follows diffusers' CogVideoXDDIMScheduler and
CogVideoXDPMScheduler: that of timestep t - T // n for n steps, which is not the timestep visited next where n does not
divide the T training timesteps, and may be timestep 0 instead of the final alpha (after 6 steps of 1000, for one).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import schedules


class Target(NamedTuple):
    """Where a step goes.

    Args:
        alpha: the alpha it arrives at, 0..1.
        final: whether that is the configuration's final alpha, past the last timestep.
    """

    alpha: float
    final: bool


def step_targets(config: dict, sigmas: torch.Tensor, alphas: list[float]) -> list[Target]:
    """Where each of n steps goes.

    Args:
        config: the scheduler configuration.
        sigmas: (n + 1,). Over a full reference schedule of a CogVideoX scheduler the targets are the published ones;
            over other sigmas, and over parts of that schedule, each step goes to the sigma after it.
        alphas: n + 1 values, alpha of every sigma.
    """
    steps = len(alphas) - 1
    values = schedules.settings(config)
    if values["_class_name"] not in schedules.COGVIDEOX_CLASSES or not schedules.follows_reference(config, sigmas):
        return [Target(alpha, final=sigmas[step].item() == 0) for step, alpha in enumerate(alphas[1:], 1)]
    table, end = schedules.alphas_cumprod(config).tolist(), schedules.final_alpha(config)
    stride = values["num_train_timesteps"] // steps
    after = [timestep - stride for timestep in schedules.timesteps(config, steps)]
    return [Target(end, final=True) if timestep < 0 else Target(table[timestep], final=False) for timestep in after]


class CogVideoXDDIM:
    """DDIM without fresh noise (Song et al. 2020, arXiv 2010.02502, eq. 12), for one run.

    Args:
        config: the scheduler configuration.
        sigmas, alphas: see `step_targets`.
        eta: 0.

    Raises:
        ValueError: eta is not 0: CogVideoX's schedulers take one and ignore it.
    """

    def __init__(self, config: dict, sigmas: torch.Tensor, alphas: list[float], eta: float = 0.0):
        if eta != 0:
            raise ValueError(f"eta is {eta}, but CogVideoX's samplers have none. Set eta to 0.")
        self.alphas = alphas
        self.targets = step_targets(config, sigmas, alphas)

    def limit(self, clean: torch.Tensor) -> torch.Tensor:
        """The x0 unchanged."""
        return clean

    def step(
        self,
        number: int,
        state: torch.Tensor,
        clean: torch.Tensor,
        direction: torch.Tensor,
        draw: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The next state (B, C, ...).

        Args:
            number: of the step, from 0.
            state, clean: the state and the x0 predicted from it.
            direction, draw: not used: the noise predicted, and a source of more.
        """
        alpha, target = self.alphas[number], self.targets[number].alpha
        kept = math.sqrt((1 - target) / (1 - alpha))
        return kept * state + (math.sqrt(target) - math.sqrt(alpha) * kept) * clean


class CogVideoXDPM(CogVideoXDDIM):
    """DPM-Solver++ 2M of the stochastic differential equation (Lu et al. 2022, arXiv 2211.01095), for one run.

    The first step, which has no prediction before it, and the one to the final alpha are of first order. Noise is drawn
    as the published scheduler draws it: frames before channels, and in a step of second order twice, of which the first
    draw is not used. A generator per clip then gives the published noise.
    """

    def __init__(self, config: dict, sigmas: torch.Tensor, alphas: list[float], eta: float = 0.0):
        super().__init__(config, sigmas, alphas, eta)
        self._previous = None

    def step(
        self,
        number: int,
        state: torch.Tensor,
        clean: torch.Tensor,
        direction: torch.Tensor,
        draw: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The next state (B, C, ...); steps are taken in order. For the arguments see `CogVideoXDDIM.step`.

        Args:
            draw: unit noise of a tensor's shape.

        Raises:
            ValueError: the sigmas do not fall.
        """
        alpha, (target, final) = self.alphas[number], self.targets[number]
        if target <= alpha and not final:
            raise ValueError(
                f"CogVideoX DPM adds noise in each step and needs sigmas that fall; step {number} does not lower "
                "them. Use cogvideox_ddim with rising sigmas."
            )
        # The final alpha may be the one that the last step starts from, of which the sigma's float32 leaves a trace.
        gap = max(_log_signal_to_noise(target) - _log_signal_to_noise(alpha), 0.0)
        noise = _draw_frames_first(state, draw)
        estimate = clean
        if number > 0 and not final:
            before = _log_signal_to_noise(alpha) - _log_signal_to_noise(self.alphas[number - 1])
            weight = gap / (2 * before)
            estimate = (1 + weight) * clean - weight * self._previous
            noise = _draw_frames_first(state, draw)
        self._previous = clean
        kept = math.sqrt((1 - target) / (1 - alpha)) * math.exp(-gap)
        gained = -math.expm1(-2 * gap)
        return kept * state + gained * math.sqrt(target) * estimate + math.sqrt((1 - target) * gained) * noise


def _log_signal_to_noise(alpha: float) -> float:
    """log(sqrt(alpha) / sqrt(1 - alpha)), infinite at both ends."""
    if alpha in (0.0, 1.0):
        return math.inf if alpha else -math.inf
    return 0.5 * math.log(alpha / (1 - alpha))


def _draw_frames_first(state: torch.Tensor, draw: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Noise for a clip (B, C, F, H, W), drawn as (B, F, C, H, W); for other shapes drawn as they are."""
    return draw(state.transpose(1, 2)).transpose(1, 2) if state.ndim == 5 else draw(state)
