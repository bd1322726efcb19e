"""The blocks of ConsisID's transformer, as ComfyUI runs them.

Each class keeps the parameters of the diffusers class it extends and computes the same numbers. Text and picture tokens
stay one sequence (B, T + N, C), the T text tokens first, instead of being split and joined in every layer.
"""

import comfy.model_management
import torch
from comfy.ldm.flux.math import apply_rope1
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.consisid_transformer_3d import ConsisIDBlock
from torch.nn.functional import gelu, linear

from .adopt import is_bypassed
from .attention import attend
from .block_patches import BlockPatches, patched
from .held_weights import held_weights

# What ComfyUI's nodes may patch here, and where. The block halfway through is the middle one of UNets as well.
PATCHES = ("attn1_output_patch",)
REPLACEMENTS = ("attn1", "dit")

# Rows per feed-forward chunk: bounds the hidden layer, which is four times as wide. On a CPU it stays near the caches.
CPU_ROWS = 512
DEVICE_ROWS = 8192
# Queries or keys that are rotated at once.
ROTATED_ELEMENTS = 2**24


class JointAttention(Attention):
    """Self-attention over text and picture tokens, with normalised and rotated queries and keys."""

    precision: torch.dtype | None = None

    def forward(self, hidden: torch.Tensor, rotary: torch.Tensor | None, transformer_options: dict) -> torch.Tensor:
        """Attend (B, S, C) to itself.

        Args:
            rotary: what `consisid_positions.rotary_table` returns for the S tokens, None without rotary positions.
            transformer_options: ComfyUI's; attention overrides and the patches of `PATCHES` and `REPLACEMENTS` are
                honoured. These see the heads side by side, and in "img_slice" which tokens are the picture's.
        """
        if patched(transformer_options):
            return self._patched(hidden, rotary, transformer_options)
        attended = attend(
            # no names for queries, keys and values: they are freed before the last layer, at the peak of the block
            self._heads(self.to_q(hidden), self.norm_q, rotary),
            self._heads(self.to_k(hidden), self.norm_k, rotary),
            self._heads(self.to_v(hidden)),
            self.heads,
            skip_reshape=True,
            transformer_options=transformer_options,
        )
        return self.to_out[0](attended)

    def _patched(self, hidden: torch.Tensor, rotary: torch.Tensor | None, transformer_options: dict) -> torch.Tensor:
        patches = BlockPatches(transformer_options, self)
        query = self._heads(self.to_q(hidden), self.norm_q, rotary)
        key = self._heads(self.to_k(hidden), self.norm_k, rotary)
        value = self._heads(self.to_v(hidden))
        middle = [("middle", 0, 0), ("middle", 0)] if transformer_options.get("in_the_middle") else []
        replacement = patches.replacement("attn1", *middle)
        if replacement is None:
            attended = attend(query, key, value, self.heads, skip_reshape=True, transformer_options=transformer_options)
        else:
            attended = replacement(*(part.transpose(1, 2).flatten(2) for part in (query, key, value)), patches.told)
        return patches.apply("attn1_output_patch", self.to_out[0](attended))

    def _heads(
        self, tokens: torch.Tensor, norm: torch.nn.Module | None = None, rotary: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Tokens (B, S, C) by head, (B, heads, S, C / heads), normalised and rotated."""
        tokens = tokens.unflatten(-1, (self.heads, -1))
        heads = (tokens if norm is None else norm(tokens)).transpose(1, 2)
        return heads if rotary is None else _rotated(heads, rotary)


def _rotated(heads: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
    """Heads (B, H, S, D) turned by `rotary`, some at a time and in place.

    Where no kernel is at hand, ComfyUI's rotation works on copies in float32, four times as large as the heads.
    """
    if torch.is_grad_enabled():
        return apply_rope1(heads, rotary)
    for some in heads.split(max(1, ROTATED_ELEMENTS // heads[:, 0].numel()), dim=1):
        some.copy_(apply_rope1(some, rotary))
    return heads


class ChunkedGELUFeedForward(FeedForward):
    """GELU feed-forward with the wide hidden layer of a bounded number of rows at a time; weights are fetched once."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        on_cpu = comfy.model_management.is_device_cpu(hidden.device)
        limit = CPU_ROWS if on_cpu else DEVICE_ROWS
        rows = hidden.reshape(-1, hidden.shape[-1])
        wide, narrow = getattr(self.net[0], "proj", None), self.net[2]
        bypassed = wide is None or is_bypassed(wide) or is_bypassed(narrow)
        if bypassed or type(self.net[0]) is not GELU or rows.shape[0] <= limit:
            return super().forward(hidden)
        out = torch.empty_like(rows)
        with held_weights((wide, narrow), hidden) as (wide_parts, narrow_parts):
            for chunk, target in zip(rows.split(limit), out.split(limit)):
                # one expression: nothing of a chunk is alive when the next begins
                target.copy_(
                    linear(gelu(linear(chunk, *wide_parts), approximate=self.net[0].approximate), *narrow_parts)
                )
        return out.view_as(hidden)


class JointNorm(CogVideoXLayerNormZero):
    """Layer norm, then scale and shift by the timestep, which differ for text and picture."""

    def forward(
        self, hidden: torch.Tensor, text_length: int, emb: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Norm of (B, T + N, C), and the gates (B, 1, C) of text and picture for the branch that it feeds."""
        modulation = self.linear(self.silu(emb)).unsqueeze(1)
        shift, scale, gate, text_shift, text_scale, text_gate = modulation.chunk(6, dim=-1)
        normed = self.norm(hidden)
        normed[:, :text_length].mul_(1 + text_scale).add_(text_shift)
        normed[:, text_length:].mul_(1 + scale).add_(shift)
        return normed, (text_gate, gate)


class JointBlock(ConsisIDBlock):
    """One transformer block over the joined sequence."""

    def forward(
        self,
        hidden: torch.Tensor,
        text_length: int,
        emb: torch.Tensor,
        rotary: torch.Tensor | None,
        transformer_options: dict,
    ) -> torch.Tensor:
        """Transform (B, T + N, C), T = `text_length`, at the time embedding `emb` (B, D)."""
        normed, gates = self.norm1(hidden, text_length, emb)
        hidden = hidden + _gated(self.attn1(normed, rotary, transformer_options), text_length, gates)
        normed, gates = self.norm2(hidden, text_length, emb)
        return hidden + _gated(self.ff(normed), text_length, gates)


def _gated(branch: torch.Tensor, text_length: int, gates: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    branch[:, :text_length].mul_(gates[0])
    branch[:, text_length:].mul_(gates[1])
    return branch
