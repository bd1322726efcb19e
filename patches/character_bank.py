"""What reference panels leave for later ones: sampled tokens by character, conditioning, step and layer."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from .token_sharing import Layer, Sharing

# Sigmas that differ less are the same: ComfyUI's uni_pc writes 0.001 in place of 0 into those it gets.
SAME_SIGMA = 2e-3


class Evaluation(NamedTuple):
    """One evaluation of one conditioning.

    Args:
        kind: 0 positive, 1 negative, as ComfyUI counts them.
        entry: which of several of that kind.
        step: 0..steps - 1.
        visit: 0, or more where a sampler evaluates a step several times.
    """

    kind: int
    entry: int
    step: int
    visit: int


class Slot(NamedTuple):
    """Where tokens of a character belong."""

    evaluation: Evaluation
    layer: Layer


Tokens = dict[Slot, torch.Tensor]


@dataclass(frozen=True)
class Origin:
    """The run that a bank was made in; one that reads it must agree.

    Args:
        model: fingerprint of the network's weights.
        sigmas: of the run.
        width, height: of the pictures, in latent pixels.
        sharing: seed, rates and thresholds.
    """

    model: str
    sigmas: tuple[float, ...]
    width: int
    height: int
    sharing: Sharing


@dataclass(frozen=True)
class CharacterBank:
    """Tokens (k, C) of every character, off the GPU, in the type they were computed in.

    Args:
        origin: the run.
        characters: by name.
    """

    origin: Origin
    characters: Mapping[str, Tokens]

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(tensor.nbytes for tokens in self.characters.values() for tensor in tokens.values())

    def joined(self, characters: Mapping[str, Tokens]) -> "CharacterBank":
        """This bank with further characters."""
        return CharacterBank(self.origin, {**self.characters, **characters})

    def check_names(self, names: Collection[str]) -> None:
        """Refuse characters that are not in the bank.

        Raises:
            ValueError: see above.
        """
        missing = [name for name in names if name not in self.characters]
        if missing:
            raise ValueError(
                f"The character bank holds {', '.join(self.characters) or 'nobody'}, but not {', '.join(missing)}. "
                "Draw the reference panels of that character first, or correct the name."
            )

    def check_origin(self, run: Origin) -> None:
        """Refuse a run that the bank does not fit.

        Raises:
            ValueError: naming what differs.
        """
        found = self.origin
        if found.model != run.model:
            raise ValueError(
                "The character bank was made with another model. Load the checkpoint that the bank was made with, or "
                "draw the reference panels again."
            )
        if (found.width, found.height) != (run.width, run.height):
            raise ValueError(
                f"The character bank was made for pictures of {found.width * 8}x{found.height * 8}, this run is "
                f"{run.width * 8}x{run.height * 8}. Use the size of the bank."
            )
        if len(found.sigmas) != len(run.sigmas):
            raise ValueError(
                f"The character bank was made in {len(found.sigmas) - 1} steps, this run has {len(run.sigmas) - 1}. "
                "Use the scheduler and the steps of the bank."
            )
        if any(abs(ours - theirs) > SAME_SIGMA * max(1.0, theirs) for ours, theirs in zip(run.sigmas, found.sigmas)):
            raise ValueError(
                f"The character bank was made with other sigmas ({_some(found.sigmas)}) than this run's "
                f"({_some(run.sigmas)}). Use the scheduler of the bank."
            )
        if found.sharing != run.sharing:
            different = [
                f"{field.name} {getattr(found.sharing, field.name)} (here {getattr(run.sharing, field.name)})"
                for field in fields(Sharing)
                if getattr(found.sharing, field.name) != getattr(run.sharing, field.name)
            ]
            raise ValueError(f"The character bank was made with {', '.join(different)}. Set the same here.")

    def tokens(self, names: Collection[str], evaluation: Evaluation, layer: Layer) -> list[torch.Tensor]:
        """What the named characters left for an evaluation, one tensor (k, C) each.

        A conditioning with more entries than the reference panels had reads the first one, an evaluation that they did
        not have the last before it, and a step that they left out the nearest one.

        Raises:
            ValueError: the reference panels were drawn without this kind of conditioning.
        """
        return [self._of(name, evaluation, layer) for name in names]

    def _of(self, name: str, evaluation: Evaluation, layer: Layer) -> torch.Tensor:
        tokens, (kind, entry, step, visit) = self.characters[name], evaluation
        for wanted in (entry, 0):
            for earlier in range(visit, -1, -1):
                found = tokens.get(Slot(Evaluation(kind, wanted, step, earlier), layer))
                if found is not None:
                    return found
        others = [slot for slot in tokens if slot.layer == layer and slot.evaluation.kind == kind]
        if others:  # a cache, such as EasyCache, left the step out when the references were drawn
            return tokens[min(others, key=lambda slot: (abs(slot.evaluation.step - step), slot.evaluation))]
        branch = {0: "positive", 1: "negative"}.get(kind, f"number {kind}")
        raise ValueError(
            f"The character bank has nothing of {name} for the {branch} prompt at step {step + 1}. It was made without "
            "that prompt, as with cfg 1, or of another model: draw the reference panels again with the same settings."
        )


def _some(sigmas: tuple[float, ...]) -> str:
    return f"{sigmas[0]:.4g}, {sigmas[1]:.4g}, ... {sigmas[-1]:.4g}"
