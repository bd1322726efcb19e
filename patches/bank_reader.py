"""Fetches a character bank's tokens to the device of a forward pass, one layer ahead of their use."""

from collections.abc import Sequence

import comfy.model_management
import torch

from .character_bank import CharacterBank, Evaluation
from .token_sharing import Layer


class BankReader:
    """The tokens that one forward pass reads.

    Args:
        bank: where from.
        characters: whose tokens, one after the other.
        evaluations: of the forward pass.
        layers: that read, in the order of execution.
    """

    def __init__(
        self,
        bank: CharacterBank,
        characters: Sequence[str],
        evaluations: Sequence[Evaluation],
        layers: Sequence[Layer],
    ):
        self.bank, self.characters, self.evaluations = bank, characters, evaluations
        self.following = dict(zip(layers, layers[1:]))
        self.fetched = {}

    def read(self, layer: Layer, like: torch.Tensor) -> list[torch.Tensor]:
        """Tokens (1, M, C) for each evaluation, of the device and type of `like`; starts to fetch the next layer's."""
        parts, stream = self.fetched.pop(layer, None) or self._fetch(layer, like)
        comfy.model_management.sync_stream(like.device, stream)
        if stream is not None:
            # What the other stream allocated must not be given away before this one has read it.
            for tensor in (tensor for tokens in parts for tensor in tokens):
                tensor.record_stream(comfy.model_management.current_stream(like.device))
        if layer in self.following:
            self.fetched[self.following[layer]] = self._fetch(self.following[layer], like)
        joined = [tokens[0] if len(tokens) == 1 else torch.cat(tokens) for tokens in parts]
        return [tokens.unsqueeze(0) for tokens in joined]

    def _fetch(self, layer: Layer, like: torch.Tensor) -> tuple[list[list[torch.Tensor]], object]:
        stream = comfy.model_management.get_offload_stream(like.device)
        parts = [
            [
                comfy.model_management.cast_to(tokens, like.dtype, like.device, non_blocking=True, stream=stream)
                for tokens in self.bank.tokens(self.characters, evaluation, layer)
            ]
            for evaluation in self.evaluations
        ]
        return parts, stream
