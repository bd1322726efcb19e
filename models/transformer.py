"""Attention, feed-forward and the spatial transformer of diffusers' 3-D UNets, as ComfyUI runs them.

Each class keeps the parameters of the diffusers class it extends and computes the same numbers with less work:
attention goes through ComfyUI's optimized attention, keys and values of the text come in projected (once per run),
and all frames of a clip share them as one long query instead of repeating them per frame.
"""

import comfy.model_management
import comfy.ops
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch.nn.functional import gelu, linear

from .adopt import is_bypassed
from .attention import attend
from .block_patches import patched, run_patched
from .held_weights import held_weights

# Rows per feed-forward chunk. On a CPU the 8x wider hidden layer of 512 rows stays near the caches; on other devices
# chunks only bound memory.
CPU_ROWS = 512
DEVICE_ROWS = 65536


class OptimizedAttention(Attention):
    """Plain multi-head attention (no masks, norms or added projections) through ComfyUI's attention function."""

    # type in which scores are computed where a backend stores them; None: that of the tokens
    precision: torch.dtype | None = None

    def forward(self, hidden: torch.Tensor, keys_values: tuple | None = None, transformer_options: dict | None = None):
        """Attend `hidden` (N, L, C) to itself, or to projected `keys_values`, two tensors (N, S, heads * dim)."""
        keys, values = (self.to_k(hidden), self.to_v(hidden)) if keys_values is None else keys_values
        return self.attend(self.to_q(hidden), keys, values, transformer_options)

    def attend(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, transformer_options: dict | None
    ) -> torch.Tensor:
        """Attention of queries (N, L, C) over keys and values (N, S, C), projected to (N, L, C)."""
        attended = attend(
            queries,
            keys,
            values,
            self.heads,
            attn_precision=self.precision,
            transformer_options=transformer_options or {},
        )
        return self.to_out[0](attended)

    def project(self, context: torch.Tensor) -> torch.Tensor:
        """Keys and values of a text (B, S, D) side by side: (B, S, 2 * heads * dim)."""
        return torch.cat((self.to_k(context), self.to_v(context)), dim=-1)


class ChunkedFeedForward(FeedForward):
    """GEGLU feed-forward with the wide hidden layer of a bounded number of rows at a time; weights are fetched once."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        on_cpu = comfy.model_management.is_device_cpu(hidden.device)
        limit, geglu = (CPU_ROWS, _geglu_columns) if on_cpu else (DEVICE_ROWS, _geglu_rows)
        rows = hidden.reshape(-1, hidden.shape[-1])
        wide, narrow = self.net[0].proj, self.net[2]
        bypassed = is_bypassed(wide) or is_bypassed(narrow)
        # training: autograd cannot follow what is written in place, and the layers may be torch's own
        trained = torch.is_grad_enabled() or not isinstance(wide, comfy.ops.CastWeightBiasOp)
        if bypassed or trained or (rows.shape[0] <= limit and not on_cpu):
            return super().forward(hidden)
        out = torch.empty_like(rows)
        with held_weights((wide, narrow), hidden) as (wide_parts, narrow_parts):
            for chunk, target in zip(rows.split(limit), out.split(limit)):
                target.copy_(geglu(chunk, *wide_parts, *narrow_parts))
        return out.view_as(hidden)


def _geglu_rows(rows, wide_weight, wide_bias, narrow_weight, narrow_bias) -> torch.Tensor:
    value, gate = linear(rows, wide_weight, wide_bias).chunk(2, dim=-1)
    return linear(value * gelu(gate), narrow_weight, narrow_bias)


def _geglu_columns(rows, wide_weight, wide_bias, narrow_weight, narrow_bias) -> torch.Tensor:
    """The same with the features along the first axis: a CPU multiplies few rows by large weights faster so."""
    value, gate = torch.addmm(wide_bias[:, None], wide_weight, rows.t()).chunk(2)
    return torch.addmm(narrow_bias[:, None], narrow_weight, value.mul_(gelu(gate))).t()


class SpatialTransformer(Transformer2DModel):
    """Self-attention within each frame, cross-attention to the text shared by all frames of a clip."""

    def forward(
        self,
        hidden: torch.Tensor,
        keys_values: torch.Tensor,
        transformer_options: dict | None = None,
        context: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Transform frames (B * F, C, h, w) with projected text `keys_values` (B, S, 2 * C) of this layer.

        The text itself, `context` (B, S, D), is for patches.
        """
        frames, channels, height, width = hidden.shape
        clips = keys_values.shape[0]
        tokens = self.norm(hidden).permute(0, 2, 3, 1).reshape(frames, height * width, channels)
        tokens = self.proj_in(tokens)
        text = keys_values.chunk(2, dim=-1)
        for index, block in enumerate(self.transformer_blocks):
            if patched(transformer_options):
                transformer_options["block_index"] = index
                transformer_options["activations_shape"] = list(hidden.shape)
                tokens = run_patched(block, tokens, lambda normed: normed, context, text, transformer_options)
                continue
            tokens = tokens + block.attn1(block.norm1(tokens), transformer_options=transformer_options)
            clip_tokens = block.norm2(tokens).view(clips, -1, tokens.shape[-1])
            tokens = tokens + block.attn2(clip_tokens, text, transformer_options).view_as(tokens)
            tokens = tokens + block.ff(block.norm3(tokens))
        tokens = self.proj_out(tokens).view(frames, height, width, channels)
        return hidden + tokens.permute(0, 3, 1, 2)
