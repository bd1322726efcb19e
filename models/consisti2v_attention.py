"""The attentions of ConsistI2V's network.

Both self-attentions also look at the first frame of the clip: the spatial one at all of its tokens, the temporal one at
the 3x3 window around the pixel. Layers as in ConsistI2V (Ren et al. 2024, arXiv 2402.04324), keys as published.
"""

import comfy.model_management
import torch

from .transformer import OptimizedAttention

ROTARY_BASE = 10000.0


class ClipAttention(OptimizedAttention):
    """Multi-head attention without query, key and value biases.

    Args:
        channels: of the tokens that ask.
        heads: number of heads.
        context_channels: of the tokens that answer; None for self-attention.
    """

    # scores of SD 2's text encoder width overflow 16 bits where a backend stores them (as in ComfyUI's own SD 2)
    precision = torch.float32

    def __init__(self, channels: int, heads: int, context_channels: int | None = None):
        super().__init__(channels, context_channels, heads=heads, dim_head=channels // heads, bias=False)


class TextAttention(ClipAttention):
    """Cross-attention; all tokens of a clip share the keys and values of its text."""

    def forward(self, tokens: torch.Tensor, text: tuple, transformer_options: dict | None = None) -> torch.Tensor:
        """Attend tokens (B, M, N, C) to projected `text`, two tensors (B, S, C)."""
        return self.attend(self.to_q(tokens).flatten(1, 2), *text, transformer_options).view_as(tokens)


class FirstFrameAttention(ClipAttention):
    """Spatial self-attention: every frame sees its own tokens and those of the first frame."""

    def forward(self, tokens: torch.Tensor, transformer_options: dict | None = None) -> torch.Tensor:
        """Attend frames of tokens (B, F, h * w, C)."""
        keys, values = (_with_first_frame(project(tokens)) for project in (self.to_k, self.to_v))
        return self.attend(self.to_q(tokens).flatten(0, 1), keys, values, transformer_options).view_as(tokens)


def beside_first_frame(tokens: torch.Tensor, frames: int) -> torch.Tensor:
    """Tokens (B * F, L, C) of F frames, each followed by the first frame's at its place: (B * F, 2 * L, C)."""
    clips = tokens.unflatten(0, (-1, frames))
    return torch.stack((clips, clips[:, :1].expand_as(clips)), dim=3).flatten(2, 3).flatten(0, 1)


def _with_first_frame(projected: torch.Tensor) -> torch.Tensor:
    """(B, F, L, C) -> (B * F, 2 * L, C), the first frame's tokens behind each frame's own."""
    return torch.cat((projected, projected[:, :1].expand_as(projected)), dim=2).flatten(0, 1)


class TemporalAttention(ClipAttention):
    """Self-attention over the frames of each pixel and the pixels around it in the first frame.

    Queries and keys are rotated by their frame's number. The first frame's is 0, so its keys serve as they are.
    """

    def __init__(self, channels: int, heads: int):
        super().__init__(channels, heads)
        self.rotary_emb = RotaryEmbedding(channels)

    def forward(
        self, tokens: torch.Tensor, window: torch.Tensor | None, transformer_options: dict | None = None
    ) -> torch.Tensor:
        """Attend pixels of tokens (B, h * w, F, C); `window` as of `neighbours`, None to see the own pixel only."""
        turns = self.rotary_emb(tokens)
        queries, keys = (rotate(project(tokens), *turns) for project in (self.to_q, self.to_k))
        values = self.to_v(tokens)
        if window is not None:
            keys, values = (torch.cat((own, own[:, :, 0][:, window]), dim=2) for own in (keys, values))
        attended = self.attend(*(part.flatten(0, 1) for part in (queries, keys, values)), transformer_options)
        return attended.view_as(tokens)


class TemporalTextAttention(TextAttention):
    """Cross-attention whose queries are rotated by their frame's number; the text's keys never are.

    The original rotates those too when a clip has as many frames as the text has tokens (77), by accident.
    """

    def __init__(self, channels: int, heads: int, context_channels: int):
        super().__init__(channels, heads, context_channels)
        self.rotary_emb = RotaryEmbedding(channels)

    def forward(self, tokens: torch.Tensor, text: tuple, transformer_options: dict | None = None) -> torch.Tensor:
        """Attend tokens (B, h * w, F, C) to projected `text`, two tensors (B, S, C)."""
        queries = rotate(self.to_q(tokens), *self.rotary_emb(tokens))
        return self.attend(queries.flatten(1, 2), *text, transformer_options).view_as(tokens)


class RotaryEmbedding(torch.nn.Module):
    """Angles of a rotary position embedding (Su et al. 2021) of half of the channels, before they split into heads."""

    def __init__(self, channels: int):
        super().__init__()
        exponents = torch.arange(0, channels // 2, 2, dtype=torch.float32) / (channels // 2)
        self.freqs = torch.nn.Parameter(ROTARY_BASE**-exponents, requires_grad=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (F, C / 4) of tokens (..., F, C), in their type."""
        frequencies = comfy.model_management.cast_to(self.freqs, torch.float32, tokens.device)
        positions = torch.arange(tokens.shape[-2], device=tokens.device, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        return angles.cos().to(tokens.dtype), angles.sin().to(tokens.dtype)


def rotate(tokens: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotate the leading channels of tokens (..., F, C), neighbours in pairs, by angles (F, up to C / 2)."""
    turned, kept = tokens.tensor_split((2 * cosines.shape[-1],), dim=-1)
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((first * cosines - second * sines, second * cosines + first * sines), dim=-1)
    return torch.cat((turned.flatten(-2), kept), dim=-1)


def neighbours(height: int, width: int, device: torch.device) -> torch.Tensor:
    """Flat indices (h * w, 8) of the pixels around each pixel, row by row; outside, the nearest pixel inside."""
    steps = torch.arange(-1, 2, device=device)
    rows = (torch.arange(height, device=device).view(-1, 1) + steps).clamp(0, height - 1)
    columns = (torch.arange(width, device=device).view(-1, 1) + steps).clamp(0, width - 1)
    window = (rows.view(height, 1, 3, 1) * width + columns.view(1, width, 1, 3)).view(-1, 9)
    return torch.cat((window[:, :4], window[:, 5:]), dim=1)
