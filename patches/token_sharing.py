"""Which tokens the panels of a story share, and in which layers.

Consistent self-attention of StoryDiffusion (Zhou et al. 2024, arXiv 2405.01434; numbers of its released low-memory
generation, repository HVision-NKU/StoryDiffusion). Every draw follows from the seed, the step and the layer, never from
the order of calls, so that it does not matter how ComfyUI splits a batch.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

# Steps of the schedule that step numbers refer to when they are shares of it.
PUBLISHED_STEPS = 50
# Latent pixels per token, from which on a grid is the coarse one (tokens of 32 pixels or more).
COARSE = 4


class Layer(NamedTuple):
    """A transformer block of ComfyUI's UNet: ("output", block number, number of the block in its transformer)."""

    part: str
    block: int
    index: int


@dataclass(frozen=True)
class Sharing:
    """What is shared when.

    Args:
        rate_32: share of tokens of the other panels that a panel sees in layers whose tokens are 32 pixels or more.
        rate_64: the same for finer layers.
        start_step: first step at which panels see each other; before it is the warm-up.
        plain_early: probability that a layer is left as it is, before `late_step`.
        plain_late: the same from `late_step` on.
        late_step: see above.
        seed: of all draws.
        count: "fixed": the same number of tokens of every panel. "random": each token by itself, as published.
        warm_up: "plain": panels do not see each other in it. "full_bank": panels that read a bank see all of it, as
            in the published demo.
        unit: "steps": step numbers as they are. "fractions": they are shares of 50 steps, the published number.

    Raises:
        ValueError: a rate or probability outside 0..1, or an unknown word.
    """

    rate_32: float = 0.5
    rate_64: float = 0.5
    start_step: int = 1
    plain_early: float = 0.3
    plain_late: float = 0.1
    late_step: int = 20
    seed: int = 0
    count: Literal["fixed", "random"] = "fixed"
    warm_up: Literal["plain", "full_bank"] = "plain"
    unit: Literal["steps", "fractions"] = "steps"

    def __post_init__(self):
        for name in ("rate_32", "rate_64", "plain_early", "plain_late"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}. Choose a value from 0 to 1.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}. Choose one of: {', '.join(known)}.")

    def rate(self, tokens_apart: int) -> float:
        """The rate of layers whose tokens are so many latent pixels apart."""
        return self.rate_32 if tokens_apart >= COARSE else self.rate_64

    def warming_up(self, step: int, steps: int) -> bool:
        """Whether step 0..steps - 1 belongs to the warm-up."""
        return step < self._number(self.start_step, steps)

    def shares(self, step: int, steps: int, layer: Layer) -> bool:
        """Whether panels see each other in a layer at step 0..steps - 1 of a run."""
        if self.warming_up(step, steps):
            return False
        plain = self.plain_early if step < self._number(self.late_step, steps) else self.plain_late
        return self._key("gate", step, *layer) / 2**64 >= plain

    def positions(self, step: int, panel: int, tokens: int, rate: float) -> torch.Tensor:
        """Ascending token numbers (k,) of a panel that the others see at a step, in all layers of that size."""
        generator = torch.Generator().manual_seed(self._key("tokens", step, panel, tokens) >> 1)
        if self.count == "fixed":
            return torch.randperm(tokens, generator=generator)[: round(rate * tokens)].sort().values
        return (torch.rand(tokens, generator=generator) < rate).nonzero().flatten()

    def _number(self, step: int, steps: int) -> int:
        return step if self.unit == "steps" else round(step * steps / PUBLISHED_STEPS)

    def _key(self, *parts: object) -> int:
        digest = hashlib.blake2b(repr((self.seed, *parts)).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big")


CHOICES = {"count": ("fixed", "random"), "warm_up": ("plain", "full_bank"), "unit": ("steps", "fractions")}
