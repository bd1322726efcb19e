"""An implementation of consistent self-attention for tests: one boolean mask over the tokens of all panels.

It takes the place of the self-attentions' `forward` in a network, so it shares no code path with ComfyUI's patches.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from comfy.ldm.modules.attention import SpatialTransformer

from consistent_video.patches.token_sharing import Layer, Sharing


def shared_attentions(network: torch.nn.Module) -> dict[Layer, torch.nn.Module]:
    """The self-attentions of a UNet's output blocks."""
    return {
        Layer("output", number, index): block.attn1
        for number, modules in enumerate(network.output_blocks)
        for module in modules
        if isinstance(module, SpatialTransformer)
        for index, block in enumerate(module.transformer_blocks)
    }


class DenseAttention:
    """Consistent self-attention of a batch of panels.

    Args:
        sharing: gates and positions.
        coarse: numbers of the output blocks whose tokens are 32 pixels or more.
        sees: for every row of the batch, the other rows that it sees.
        numbers: for every row of the batch, the number of the panel.
        scales: factors of the queries of some layers.
        step: of the evaluation; None reads it from the sampler's sigmas.
        steps: of the run.
    """

    def __init__(
        self,
        sharing: Sharing,
        coarse: Sequence[int],
        sees: Sequence[Sequence[int]],
        numbers: Sequence[int] | None = None,
        scales: dict[Layer, float] | None = None,
        step: int | None = None,
        steps: int = 0,
    ):
        self.sharing, self.coarse, self.sees, self.scales = sharing, coarse, sees, scales or {}
        self.numbers = list(range(len(sees))) if numbers is None else numbers
        self.step, self.steps = step, steps

    @contextlib.contextmanager
    def inside(self, network: torch.nn.Module) -> Iterator[None]:
        """Compute a network's self-attentions this way."""
        attentions = shared_attentions(network)
        for layer, attention in attentions.items():
            attention.forward = self._forward(layer, attention)
        try:
            yield
        finally:
            for attention in attentions.values():
                del attention.forward

    def _forward(self, layer: Layer, attention: torch.nn.Module):
        def forward(x, context=None, value=None, mask=None, transformer_options=None):
            context = x if context is None else context
            value = context if value is None else value
            queries = attention.to_q(x) * self.scales.get(layer, 1.0)
            keys, values = attention.to_k(context), attention.to_v(value)
            seen = self._mask(layer, x.shape[1], transformer_options)
            rows = len(self.sees)
            groups = [
                _attend(*(part[start : start + rows] for part in (queries, keys, values)), attention.heads, seen)
                for start in range(0, len(x), rows)
            ]
            return attention.to_out(torch.cat(groups))

        return forward

    def _mask(self, layer: Layer, tokens: int, options: dict) -> torch.Tensor:
        """(rows, rows * tokens): the tokens that every row sees."""
        step, steps = self.step, self.steps
        if step is None:
            sigmas = options["sample_sigmas"]
            steps = len(sigmas) - 1
            step = int((sigmas[:-1] - options["sigmas"][0]).abs().argmin())
        rows = len(self.sees)
        seen = torch.eye(rows, dtype=torch.bool).unsqueeze(2).repeat(1, 1, tokens)
        everything = torch.ones(tokens, dtype=torch.bool)
        warming_up = step < self.sharing.start_step
        if not warming_up and not self.sharing.shares(step, steps, layer):
            return seen.flatten(1)
        rate = self.sharing.rate_32 if layer.block in self.coarse else self.sharing.rate_64
        watched = {row for others in self.sees for row in others}
        for row, others in enumerate(self.sees):
            for other in others:
                if warming_up:
                    if self.sharing.warm_up == "full_bank" and row not in watched:
                        seen[row, other] = everything
                else:
                    sampled = self.sharing.positions(step, self.numbers[other], tokens, rate)
                    seen[row, other, sampled] = True
        return seen.flatten(1)


def _attend(queries, keys, values, heads: int, seen: torch.Tensor) -> torch.Tensor:
    """Masked attention of the rows (P, T, C) over all rows' tokens; only a row's own tokens may be more than T."""
    rows, tokens, channels = queries.shape
    queries, keys, values = (
        part.reshape(1, -1, heads, channels // heads).transpose(1, 2) for part in (queries, keys, values)
    )
    scores = queries @ keys.transpose(2, 3) * (channels // heads) ** -0.5
    scores = scores.masked_fill(~seen.repeat_interleave(tokens, 0), float("-inf"))
    return (scores.softmax(3) @ values).transpose(1, 2).reshape(rows, tokens, channels)
