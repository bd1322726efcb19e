"""What consistent self-attention knows of a sampling run and of each forward pass in it."""

import math
from collections import Counter
from typing import NamedTuple

import torch

from ..samplers.step_noise import brought_to
from .bank_reader import BankReader
from .bank_writer import BankWriter
from .character_bank import Evaluation
from .panel_attention import Added, unseen_positions
from .run_levels import sigma_at
from .schedule_place import Place, nearest_step
from .token_sharing import Layer, Sharing

KEY = "consistent_self_attention"


class Run:
    """One sampling run: which conditioning is which, how often each was evaluated at a step, and the steps.

    Args:
        conds: of the guider.
        sigmas: of the run, if they are known on the host.
        place: of the run in its schedule; None for one that is the whole of it.
        panels: pictures in the batch, if known.
    """

    def __init__(
        self,
        conds: dict[str, list[dict]],
        sigmas: list[float] | None = None,
        place: Place | None = None,
        panels: int | None = None,
    ):
        self.entries = {cond.get("uuid"): index for entries in conds.values() for index, cond in enumerate(entries)}
        self.visits = Counter()
        self.sigmas, self.place, self.panels = sigmas, place, panels
        self._level = None, 0.0

    def evaluations(self, options: dict, step: int) -> list[Evaluation]:
        """The evaluations that a forward pass makes, in the order of its groups of rows."""
        kinds = options["cond_or_uncond"]
        uuids = options.get("uuids", [None] * len(kinds))
        window = tuple(getattr(options.get("context_window"), "index_list", ()))
        found = []
        for kind, uuid in zip(kinds, uuids):
            entry = self.entries.get(uuid, 0)
            visit = self.visits[kind, entry, step, window]
            self.visits[kind, entry, step, window] += 1
            found.append(Evaluation(kind, entry, step, visit))
        return found

    def step(self, options: dict) -> int:
        """Number of the step, within the run, that a forward pass belongs to: the one of the nearest sigma."""
        sigmas = self.sigmas or options["sample_sigmas"].tolist()
        return nearest_step(sigmas, self._sigma(options))

    def _sigma(self, options: dict) -> float:
        """The value of a pass's sigma; where it has to be read, once for all passes of an evaluation."""
        sigmas = options["sigmas"]
        if self._level[0] is not sigmas:
            self._level = sigmas, sigma_at(options, sigmas)
        return self._level[1]


class Positions(NamedTuple):
    """Tokens of panels in a layer, one tensor per panel, or per tile of one; on the device.

    Args:
        seen: token numbers (k,) that all panels see.
        alone: those (S - k,) that only the panel itself sees.
    """

    seen: tuple[torch.Tensor, ...]
    alone: tuple[torch.Tensor, ...]


class Pass:
    """One forward pass: its step, its groups of rows, and the positions that its layers share.

    Raises:
        ValueError: a pass that does not say its step, or that does not hold the panels of the run.
    """

    def __init__(self, sharing: Sharing, run: Run, options: dict, rows: int):
        if options.get("sample_sigmas") is None:
            raise ValueError(
                "Consistent self-attention needs to know the step, but the sampler does not say its sigmas. Use a "
                "sampler node of ComfyUI."
            )
        step = run.step(options)
        place = run.place or Place(0, len(options["sample_sigmas"]) - 1)
        self.sharing, self.step, self.steps = sharing, place.before + step, place.steps
        self.evaluations = run.evaluations(options, step)
        self.panels = _panels(run, options, rows, len(self.evaluations))
        self.reader: BankReader | None = None
        self.writer: BankWriter | None = None
        self.replacements = options.get("patches_replace", {}).get("attn1", {})
        self.added: dict[Layer, Added] = {}
        self._drawn: dict[int, list[torch.Tensor]] = {}
        self._positions: dict[tuple, Positions] = {}

    def shares(self, layer: Layer) -> bool:
        """Whether panels see each other in a layer."""
        return self.sharing.shares(self.step, self.steps, layer)

    @property
    def warming_up(self) -> bool:
        """Whether the step belongs to the warm-up."""
        return self.sharing.warming_up(self.step, self.steps)

    def positions(self, tokens: int, options: dict, device: torch.device) -> list[torch.Tensor]:
        """Positions of the tokens that each panel shows to the others in a layer.

        Args:
            tokens: of a panel in that layer.
        """
        return list(self.shared_positions(tokens, options, device).seen)

    def shared_positions(
        self, tokens: int, options: dict, device: torch.device, tiles: int = 1, rows: int | None = None
    ) -> Positions:
        """The tokens that panels show and those they keep, drawn and sorted once per pass.

        Args:
            tokens: T of a panel in that layer.
            tiles: in how many rows of keys a panel lies, one part of its tokens after the other.
            rows: tokens S in a row of keys; T of them, or of all tiles together, are those that are drawn from.
        """
        rows = tokens if rows is None else rows
        key = tokens, tiles, rows
        if key not in self._positions:
            drawn = self._draw(tokens, options)
            seen = [part for panel in drawn for part in _tiled(panel, tiles, rows)]
            alone = [unseen_positions(part, rows) for part in seen]
            lengths = [len(part) for part in (*seen, *alone)]
            parts = brought_to(device, torch.cat((*seen, *alone))).split(lengths)
            self._positions[key] = Positions(parts[: len(seen)], parts[len(seen) :])
        return self._positions[key]

    def _draw(self, tokens: int, options: dict) -> list[torch.Tensor]:
        if tokens not in self._drawn:
            # Every halving of a grid rounds up, so that small odd widths fall short of a power of two.
            ratio = options["original_shape"][-1] / options["activations_shape"][-1]
            rate = self.sharing.rate(2 ** math.ceil(math.log2(ratio)))
            self._drawn[tokens] = [self.sharing.positions(self.step, panel, tokens, rate) for panel in self.panels]
        return self._drawn[tokens]


def panel_numbers(window: object | None, panels: int) -> list[int]:
    """Which panels of the batch a forward pass holds, of ComfyUI's context windows over the batch too."""
    if window is None or window.dim != 0:
        return list(range(panels))
    anchor = getattr(window, "causal_anchor_index", None)
    numbers = [*([] if anchor is None or anchor < 0 else [anchor]), *window.index_list]
    return numbers if len(numbers) == panels else list(range(panels))


def _panels(run: Run, options: dict, rows: int, groups: int) -> list[int]:
    """The panels of each group of rows.

    Raises:
        ValueError: rows that are not the panels of the run for each of the groups.
    """
    window = options.get("context_window")
    numbers = panel_numbers(window, rows // groups)
    whole = window is None or window.dim != 0
    if rows != groups * len(numbers) or (whole and run.panels is not None and len(numbers) != run.panels):
        raise ValueError(
            f"Consistent self-attention finds {rows} pictures where the model should see {run.panels or len(numbers)} "
            f"for each of {groups} prompts: a node behind it divides the batch, so that the pictures cannot see each "
            "other. Remove that node, or draw the pictures without consistent self-attention."
        )
    return numbers


def _tiled(positions: torch.Tensor, tiles: int, rows: int) -> list[torch.Tensor]:
    """Token numbers (k,) of a panel by the tile that they lie in, counted from the start of the tile."""
    if tiles == 1:
        return [positions]
    bounds = torch.searchsorted(positions, torch.arange(tiles + 1) * rows).tolist()
    return [positions[low:high] - tile * rows for tile, (low, high) in enumerate(zip(bounds, bounds[1:]))]
