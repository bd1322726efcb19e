"""ConsistI2V's network as a ComfyUI diffusion model.

The UNet of SD 2.1 with layers over time (Ren et al. 2024, arXiv 2402.04324), with the published key names. The first
frame comes in clean at every step; what the network predicts are the other frames.
"""

import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace

import comfy.model_management
import comfy.patcher_extension
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch.nn.functional import pad, silu

from . import block_patches
from .consisti2v_attention import TextAttention, neighbours
from .consisti2v_layers import Block, Layer, LayerSettings, MiddleBlock
from .layer_pass import (
    LayerPass,
    attention_places,
    distinct_clips,
    patch_embedding,
    skip_channels,
    start_pass,
)
from .temporal import as_frames

# Parameters that every published checkpoint has and the original never reads: a projection of a time embedding that the
# convolutions over time are not given, and position biases that the rotary embedding took the place of.
DEAD_KEYS = re.compile(r"\.conv3ds\.\d+\.time_emb_proj\.(weight|bias)$|\.rotary_bias\.relative_attention_bias\.weight$")
DEFAULT_FRAME_STRIDE = 3


def drop_dead_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A published state dict without the parameters that `ConsistI2VUNet` has no place for; see `DEAD_KEYS`."""
    return {key: tensor for key, tensor in state.items() if not DEAD_KEYS.search(key)}


class ConsistI2VUNet(torch.nn.Module):
    """First frame + text to video.

    Args: the fields of the published unet/config.json. `attention_head_dim` is the number of heads of each level, as in
        diffusers' SD 2.1; `n_frames` is what the weights were trained on and limits nothing.

    Raises:
        ValueError: a field has a value for which there is no published checkpoint.
    """

    # Angles are frequencies times frame numbers: what 16 bits round off grows with the clip.
    keep_in_fp32 = ("rotary_emb.freqs",)

    def __init__(
        self,
        sample_size: int | None = 64,
        in_channels: int = 4,
        out_channels: int = 4,
        center_input_sample: bool = False,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        mid_block_type: str = "UNetMidBlock2DCrossAttn",
        up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        downsample_padding: int = 1,
        mid_block_scale_factor: float = 1,
        act_fn: str = "silu",
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int = 1024,
        transformer_layers_per_block: int = 1,
        attention_head_dim: int | tuple[int, ...] = (5, 10, 20, 20),
        use_linear_projection: bool = True,
        use_temporal: bool = True,
        n_frames: int = 16,
        n_temp_heads: int = 8,
        first_frame_condition_mode: str = "concat",
        augment_temporal_attention: bool = True,
        temp_pos_embedding: str = "rotary",
        use_frame_stride_condition: bool = True,
    ):
        config = SimpleNamespace(**{key: value for key, value in locals().items() if key not in ("self", "__class__")})
        super().__init__()
        _check(config)
        self.config = config
        width, embedding = block_out_channels[0], 4 * block_out_channels[0]
        settings = LayerSettings(
            norm_num_groups, norm_eps, embedding, cross_attention_dim, n_temp_heads, augment_temporal_attention
        )
        self.conv_in = torch.nn.Conv2d(in_channels, width, 3, padding=1)
        self.time_proj = Timesteps(width, flip_sin_to_cos, freq_shift)
        self.time_embedding = TimestepEmbedding(width, embedding)
        if use_frame_stride_condition:
            self.frame_stride_embedding = TimestepEmbedding(width, embedding)
        self._build_blocks(settings)
        self.conv_norm_out = torch.nn.GroupNorm(norm_num_groups, width, eps=norm_eps)
        self.conv_out = torch.nn.Conv2d(width, out_channels, 3, padding=1)

    def _build_blocks(self, settings: LayerSettings) -> None:
        config = self.config
        channels, depth = list(config.block_out_channels), config.layers_per_block
        levels, heads = len(channels), config.attention_head_dim
        heads = [heads] * levels if isinstance(heads, int) else list(heads)
        self.down_blocks, self.up_blocks = torch.nn.ModuleList(), torch.nn.ModuleList()
        skips, incoming = [channels[0]], channels[0]
        for level in range(levels):
            attends = config.down_block_types[level].startswith("CrossAttn")
            last = level == levels - 1
            widths = [incoming] + [channels[level]] * (depth - 1)
            block_heads, sampler = heads[level] if attends else None, None if last else "down"
            self.down_blocks.append(Block(widths, channels[level], block_heads, sampler, settings))
            incoming = channels[level]
            skips += [incoming] * (depth if last else depth + 1)
        self.mid_block = MiddleBlock(incoming, heads[-1], settings)
        for position, level in enumerate(reversed(range(levels))):
            attends = config.up_block_types[position].startswith("CrossAttn")
            widths = []
            for _ in range(depth + 1):
                widths.append(incoming + skips.pop())
                incoming = channels[level]
            block_heads, sampler = heads[level] if attends else None, None if level == 0 else "up"
            self.up_blocks.append(Block(widths, channels[level], block_heads, sampler, settings))

    def project_text(self, context: torch.Tensor) -> torch.Tensor:
        """Keys and values of every cross-attention for a text (B, S, D), side by side, in the order of execution."""
        return torch.cat([attention.project(context) for attention in self._text_attentions()], dim=-1)

    @property
    def text_width(self) -> int:
        """Values per token of what `project_text` returns."""
        return sum(2 * attention.inner_dim for attention in self._text_attentions())

    def _text_attentions(self) -> Iterator[TextAttention]:
        for block in (*self.down_blocks, self.mid_block, *self.up_blocks):
            for layer in block.layers():
                yield from layer.text_attentions()

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **kwargs) -> torch.Tensor:
        """Predict the noise of a clip's frames after the first.

        Args:
            x: noisy latents (B, 4, F, h, w) of any number of frames.
            timesteps: (B,), 0..999.
            context: text states (B, S, D); read when `text_keys_values` is absent.
            control, transformer_options: ComfyUI's.
            text_keys_values: what `project_text` returns for the text.
            first_frame_latents: (B or 1, 4, 1, h, w), scaled, replaces x at index 0. When absent, that frame of x is
                taken for the clean one.
            frame_stride: frames of the source video per frame of the clip, a number or (B,); 3 when absent.

        Returns:
            (B, 4, F, h, w). The network predicts nothing for the first frame: index 0 is zeros, a placeholder.
        """
        options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, control, options, **kwargs)

    def _forward(
        self,
        x,
        timesteps,
        context,
        control,
        transformer_options,
        text_keys_values=None,
        first_frame_latents=None,
        frame_stride=None,
        **kwargs,
    ) -> torch.Tensor:
        if text_keys_values is None:
            text_keys_values = self.project_text(context)
        if first_frame_latents is not None:
            first = comfy.model_management.cast_to(first_frame_latents, x.dtype, x.device)
            x = torch.cat((first.expand(x.shape[0], -1, -1, -1, -1), x[:, :, 1:]), dim=2)
        start_pass(x, transformer_options)
        emb = self._embed(timesteps, frame_stride, x, transformer_options)
        clips, frames = x.shape[0], x.shape[2]
        widths = [2 * attention.inner_dim for attention in self._text_attentions()]
        frame_emb, projected = emb.repeat_interleave(frames, dim=0), text_keys_values.split(widths, dim=-1)
        run = _Pass(frame_emb, projected, frames, transformer_options, context, control)
        distinct = distinct_clips(x, emb, transformer_options, control)
        hidden = self._run_blocks(self.conv_in(as_frames(x[:distinct])), run, x, timesteps)
        predicted = hidden.unflatten(0, (clips, frames))[:, 1:].flatten(0, 1)
        predicted = self.conv_out(silu(self.conv_norm_out(predicted)))
        predicted = predicted.unflatten(0, (clips, frames - 1)).transpose(1, 2)
        return pad(predicted, (0, 0, 0, 0, 1, 0))

    @property
    def in_channels(self) -> int:
        """Channels of the latents, where ComfyUI's nodes look for them."""
        return self.config.in_channels

    def skip_channels(self) -> list[int]:
        """Channels of what is kept on the way down, block by block."""
        return skip_channels(self.config.block_out_channels, self.config.layers_per_block)

    def places(self) -> dict[str, set[tuple]]:
        """Places of ComfyUI's `patches_replace` that the network has, by name."""
        levels = (
            [[layer.spatial is not None for layer in block.layers()] for block in blocks]
            for blocks in (self.down_blocks, self.up_blocks)
        )
        return dict.fromkeys(block_patches.REPLACEMENTS, attention_places(*levels))

    def _embed(
        self,
        timesteps: torch.Tensor,
        frame_stride: torch.Tensor | float | None,
        x: torch.Tensor,
        transformer_options: dict,
    ) -> torch.Tensor:
        """The time embedding (B, D), with the frame stride's added to it."""
        emb = self.time_embedding(self.time_proj(timesteps.expand(x.shape[0])).to(x.dtype))
        emb = patch_embedding(emb, self.config.block_out_channels[0], transformer_options)
        if not self.config.use_frame_stride_condition:
            return emb
        stride = DEFAULT_FRAME_STRIDE if frame_stride is None else frame_stride
        stride = torch.as_tensor(stride, device=x.device).reshape(-1).expand(x.shape[0])
        return emb + self.frame_stride_embedding(self.time_proj(stride).to(x.dtype))

    def _run_blocks(self, hidden: torch.Tensor, run: "_Pass", x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        hidden, skip = run.leave_input(hidden)
        skips = [skip]
        for block in self.down_blocks:
            for layer in block.layers():
                run.enter_input()
                hidden, skip = run.leave_input(run.layer(layer, hidden))
                skips.append(skip)
            for downsampler in getattr(block, "downsamplers", ()):
                run.enter_input()
                hidden, skip = run.leave_input(downsampler(hidden))
                skips.append(skip)
        run.enter_middle()
        for layer in self.mid_block.layers():
            hidden = run.layer(layer, hidden)
        hidden = run.leave_middle(hidden, x, timesteps)
        for block in self.up_blocks:
            for layer in block.layers():
                hidden = run.layer(layer, run.enter_output(hidden, skips.pop()))
            for upsampler in getattr(block, "upsamplers", ()):
                hidden = upsampler(hidden, output_size=skips[-1].shape[2:])
        return hidden


class _Pass(LayerPass):
    """One pass over the layers."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._windows: dict[torch.Size, torch.Tensor] = {}

    def window(self, frames: torch.Tensor) -> torch.Tensor:
        """The pixels around each pixel of frames (B * F, C, h, w), computed once for every size."""
        size = frames.shape[2:]
        if size not in self._windows:
            self._windows[size] = neighbours(*size, frames.device)
        return self._windows[size]

    def layer(self, layer: Layer, hidden: torch.Tensor) -> torch.Tensor:
        hidden = layer.resnet(hidden, self.emb[: hidden.shape[0]])
        hidden = layer.temporal_resnet(hidden, hidden.shape[0] // self.num_frames)
        if layer.spatial is not None:
            hidden = layer.spatial(self.repeat(hidden), next(self.keys_values), self.options, self.context)
        if layer.temporal is not None:
            window = self.window(hidden) if layer.temporal.window else None
            hidden = layer.temporal(hidden, next(self.keys_values), self.options, window)
        if layer.spatial is not None:
            self.attended()
        return hidden


def _check(config: SimpleNamespace) -> None:
    """Raise a ValueError for a configuration that this class does not describe."""
    published = {
        "center_input_sample": False,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "act_fn": "silu",
        "transformer_layers_per_block": 1,
        "use_linear_projection": True,
        "use_temporal": True,
        "first_frame_condition_mode": "concat",
        "temp_pos_embedding": "rotary",
    }
    for field, expected in published.items():
        found = getattr(config, field)
        if found != expected:
            raise ValueError(f"{field} is {found!r}, but ConsistI2V is published with {expected!r}")
    levels = len(config.block_out_channels)
    for field, kinds in (
        ("down_block_types", ("CrossAttnDownBlock2D", "DownBlock2D")),
        ("up_block_types", ("CrossAttnUpBlock2D", "UpBlock2D")),
    ):
        found = getattr(config, field)
        if len(found) != levels or not set(found) <= set(kinds):
            raise ValueError(f"{field} is {found!r}, expected one of {' or '.join(kinds)} for each of {levels} levels")
    heads = config.attention_head_dim
    if not isinstance(heads, int) and len(heads) != levels:
        raise ValueError(f"attention_head_dim is {heads!r}, expected a number of heads for each of {levels} levels")
