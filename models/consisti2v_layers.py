"""The layers of ConsistI2V's network: SD 2.1's blocks with layers over time, parameters named as published."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import comfy.model_management
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch.nn.functional import silu

from .block_patches import patched, run_patched
from .consisti2v_attention import (
    FirstFrameAttention,
    TemporalAttention,
    TemporalTextAttention,
    TextAttention,
    beside_first_frame,
)
from .temporal import as_clip, as_frames
from .transformer import ChunkedFeedForward

TEMPORAL_NORM_EPS = 1e-6


@dataclass(frozen=True)
class LayerSettings:
    """What all layers of a network share.

    Args:
        groups: of the group norms outside of `TemporalResnet`, which always has 32.
        norm_eps: of the resnets' norms.
        embedding: width of the time embedding.
        context: width of the text.
        temporal_heads: heads of the temporal attentions.
        window: temporal attentions see the first frame's pixels around theirs.
    """

    groups: int
    norm_eps: float
    embedding: int
    context: int
    temporal_heads: int
    window: bool

    def resnet(self, channels: int, out_channels: int) -> ResnetBlock2D:
        return ResnetBlock2D(
            in_channels=channels,
            out_channels=out_channels,
            temb_channels=self.embedding,
            groups=self.groups,
            eps=self.norm_eps,
        )


def _mix(hidden: torch.Tensor, change: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """alpha * hidden + (1 - alpha) * (hidden + change), alpha clamped to [0, 1].

    `adopt.bring_small_tensors` has loaded alpha; what is left is its type.
    """
    share = 1 - comfy.model_management.cast_to(alpha, hidden.dtype, hidden.device).clamp(0, 1)
    return torch.addcmul(hidden, change, share)


class TemporalResnet(torch.nn.Module):
    """Two convolutions over time; `alpha` is how much of their result is left out."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1 = torch.nn.GroupNorm(32, channels, eps=TEMPORAL_NORM_EPS)
        self.conv1 = torch.nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.norm2 = torch.nn.GroupNorm(32, channels, eps=TEMPORAL_NORM_EPS)
        self.conv2 = torch.nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        self.alpha = torch.nn.Parameter(torch.ones(1))

    def forward(self, hidden: torch.Tensor, clips: int) -> torch.Tensor:
        """Convolve frames (B * F, C, h, w) of B clips along F; norms are per frame."""
        change = hidden
        for norm, convolution in ((self.norm1, self.conv1), (self.norm2, self.conv2)):
            change = as_frames(convolution(as_clip(silu(norm(change)), hidden.shape[0] // clips)))
        return _mix(hidden, change, self.alpha)


class _TransformerBlock(torch.nn.Module):
    def __init__(self, channels: int, self_attention: torch.nn.Module, text_attention: torch.nn.Module):
        super().__init__()
        self.norm1 = torch.nn.LayerNorm(channels)
        self.attn1 = self_attention
        self.norm2 = torch.nn.LayerNorm(channels)
        self.attn2 = text_attention
        self.norm3 = torch.nn.LayerNorm(channels)
        self.ff = ChunkedFeedForward(channels, activation_fn="geglu")


class _Transformer(torch.nn.Module):
    def __init__(self, channels: int, heads: int, groups: int, block: _TransformerBlock):
        super().__init__()
        if channels % heads or channels % 4:
            raise ValueError(f"{channels} channels cannot be divided among {heads} heads")
        self.norm = torch.nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = torch.nn.Linear(channels, channels)
        self.transformer_blocks = torch.nn.ModuleList([block])
        self.proj_out = torch.nn.Linear(channels, channels)

    @property
    def text_attention(self) -> TextAttention:
        return self.transformer_blocks[0].attn2


class SpatialTransformer(_Transformer):
    """Attention within each frame and to the first frame, then to the text."""

    def __init__(self, channels: int, heads: int, settings: LayerSettings):
        attentions = FirstFrameAttention(channels, heads), TextAttention(channels, heads, settings.context)
        super().__init__(channels, heads, settings.groups, _TransformerBlock(channels, *attentions))

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
        tokens = self.norm(hidden).flatten(2).transpose(1, 2).unflatten(0, (keys_values.shape[0], -1))
        tokens = self.proj_in(tokens)
        frames = tokens.shape[1]
        for index, block in enumerate(self.transformer_blocks):
            if patched(transformer_options):
                transformer_options["block_index"] = index
                transformer_options["activations_shape"] = list(hidden.shape)
                seen, text = partial(beside_first_frame, frames=frames), keys_values.chunk(2, dim=-1)
                rows = run_patched(block, tokens.flatten(0, 1), seen, context, text, transformer_options)
                tokens = rows.view_as(tokens)
                continue
            tokens = tokens + block.attn1(block.norm1(tokens), transformer_options)
            tokens = tokens + block.attn2(block.norm2(tokens), keys_values.chunk(2, dim=-1), transformer_options)
            tokens = tokens + block.ff(block.norm3(tokens))
        change = self.proj_out(tokens).transpose(2, 3)
        return hidden + change.reshape(hidden.shape)


class TemporalTransformer(_Transformer):
    """Attention over the frames of each pixel, then to the text; `alpha` is how much of the result is left out."""

    def __init__(self, channels: int, settings: LayerSettings):
        heads = settings.temporal_heads
        attentions = TemporalAttention(channels, heads), TemporalTextAttention(channels, heads, settings.context)
        super().__init__(channels, heads, settings.groups, _TransformerBlock(channels, *attentions))
        self.window = settings.window
        self.alpha = torch.nn.Parameter(torch.ones(1))

    def forward(
        self,
        hidden: torch.Tensor,
        keys_values: torch.Tensor,
        transformer_options: dict | None = None,
        window: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Transform frames (B * F, C, h, w) with projected text `keys_values` (B, S, 2 * C) of this layer.

        A layer that has a `window` needs that of its pixels, see `neighbours`.
        """
        frames = self.norm(hidden).flatten(2).unflatten(0, (keys_values.shape[0], -1))
        tokens = self.proj_in(frames.permute(0, 3, 1, 2).contiguous())
        for block in self.transformer_blocks:
            tokens = tokens + block.attn1(block.norm1(tokens), window, transformer_options)
            tokens = tokens + block.attn2(block.norm2(tokens), keys_values.chunk(2, dim=-1), transformer_options)
            tokens = tokens + block.ff(block.norm3(tokens))
        change = self.proj_out(tokens).permute(0, 2, 3, 1)
        return _mix(hidden, change.reshape(hidden.shape), self.alpha)


@dataclass(frozen=True)
class Layer:
    """One layer of a block; the transformers may be None."""

    resnet: ResnetBlock2D
    temporal_resnet: TemporalResnet
    spatial: SpatialTransformer | None
    temporal: TemporalTransformer | None

    def text_attentions(self) -> list[TextAttention]:
        """Its attentions to the text, in the order of execution."""
        return [transformer.text_attention for transformer in (self.spatial, self.temporal) if transformer is not None]


class Block(torch.nn.Module):
    """The layers of one resolution on the way down or up.

    Args:
        widths: channels that come into each layer's resnet.
        channels: channels that come out of all of them.
        heads: of the spatial attentions; None for a block without attention.
        sampler: "down", "up" or None, the change of resolution at the end.
    """

    def __init__(
        self, widths: list[int], channels: int, heads: int | None, sampler: str | None, settings: LayerSettings
    ):
        super().__init__()
        self.resnets = torch.nn.ModuleList([settings.resnet(width, channels) for width in widths])
        self.conv3ds = torch.nn.ModuleList([TemporalResnet(channels) for _ in widths])
        if heads is not None:
            self.attentions = torch.nn.ModuleList([SpatialTransformer(channels, heads, settings) for _ in widths])
            self.tempo_attns = torch.nn.ModuleList([TemporalTransformer(channels, settings) for _ in widths])
        if sampler == "down":
            self.downsamplers = torch.nn.ModuleList([Downsample2D(channels, use_conv=True, name="op")])
        elif sampler == "up":
            self.upsamplers = torch.nn.ModuleList([Upsample2D(channels, use_conv=True)])

    def layers(self) -> Iterator[Layer]:
        nothing = (None,) * len(self.resnets)
        transformers = getattr(self, "attentions", nothing), getattr(self, "tempo_attns", nothing)
        return map(Layer, self.resnets, self.conv3ds, *transformers)


class MiddleBlock(torch.nn.Module):
    """Two layers around a spatial attention; none over time."""

    def __init__(self, channels: int, heads: int, settings: LayerSettings):
        super().__init__()
        self.resnets = torch.nn.ModuleList([settings.resnet(channels, channels) for _ in range(2)])
        self.conv3ds = torch.nn.ModuleList([TemporalResnet(channels) for _ in range(2)])
        self.attentions = torch.nn.ModuleList([SpatialTransformer(channels, heads, settings)])

    def layers(self) -> Iterator[Layer]:
        return map(Layer, self.resnets, self.conv3ds, (*self.attentions, None), (None, None))
