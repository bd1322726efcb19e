"""diffusers' 3-D UNets as ComfyUI diffusion models.

The classes keep the published parameters and key names; `forward` has ComfyUI's signature and runs the block lists
itself, so that the text's keys and values are projected once per run, frames stay folded into the batch, and ComfyUI's
block patches (FreeU and its like) apply.
"""

import comfy.patcher_extension
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_3d_condition import UNet3DConditionModel
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLTransformerTemporalEncoder

from . import block_patches
from .layer_pass import (
    LayerPass,
    attention_places,
    distinct_clips,
    patch_embedding,
    skip_channels,
    start_pass,
)
from .temporal import PictureEncoder, TemporalConv, TemporalTransformer, as_clip, as_frames
from .transformer import ChunkedFeedForward, OptimizedAttention, SpatialTransformer

REPLACEMENTS = {
    Attention: OptimizedAttention,
    FeedForward: ChunkedFeedForward,
    Transformer2DModel: SpatialTransformer,
    TransformerTemporalModel: TemporalTransformer,
    TemporalConvLayer: TemporalConv,
    I2VGenXLTransformerTemporalEncoder: PictureEncoder,
}


class BlockRunner:
    """Runs the blocks of a 3-D UNet over frames folded into the batch; mixed into the network's class."""

    def project_text(self, context: torch.Tensor) -> torch.Tensor:
        """Keys and values of every cross-attention for a text (B, S, D), side by side, in the order of execution."""
        return torch.cat([attention.project(context) for attention in self._text_attentions()], dim=-1)

    @property
    def text_width(self) -> int:
        """Values per token of what `project_text` returns."""
        return sum(2 * attention.inner_dim for attention in self._text_attentions())

    def _text_attentions(self) -> list[OptimizedAttention]:
        blocks = (*self.down_blocks, self.mid_block, *self.up_blocks)
        transformers = [
            transformer for block in blocks if hasattr(block, "attentions") for transformer in block.attentions
        ]
        return [transformer.transformer_blocks[0].attn2 for transformer in transformers]

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
            [[hasattr(block, "attentions")] * len(block.resnets) for block in blocks]
            for blocks in (self.down_blocks, self.up_blocks)
        )
        return dict.fromkeys(block_patches.REPLACEMENTS, attention_places(*levels))

    def embed_time(self, timesteps: torch.Tensor, x: torch.Tensor, transformer_options: dict) -> torch.Tensor:
        """The time embedding (B, D) of a clip x, with ComfyUI's patches of it."""
        emb = self.time_embedding(self.time_proj(timesteps).to(x.dtype))
        return patch_embedding(emb, self.config.block_out_channels[0], transformer_options)

    def start_layers(
        self,
        emb: torch.Tensor,
        keys_values: torch.Tensor,
        num_frames: int,
        transformer_options: dict,
        context: torch.Tensor | None,
        control: dict | None,
    ) -> "_Layers":
        """A pass over the blocks.

        Args:
            emb: time embedding of each clip (B, D).
            keys_values: what `project_text` returns, (B, S, sum of the layers' widths).
            num_frames: F.
            transformer_options, context, control: see `LayerPass`.
        """
        emb = emb.repeat_interleave(num_frames, dim=0)
        widths = [2 * attention.inner_dim for attention in self._text_attentions()]
        return _Layers(emb, keys_values.split(widths, dim=-1), num_frames, transformer_options, context, control)

    def run_blocks(
        self, hidden: torch.Tensor, layers: "_Layers", x: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Run all blocks.

        Args:
            hidden: frames (B * F, C, h, w); fewer clips where the B clips repeat them, see `distinct_clips`.
            x, timesteps: the network's inputs, for patches.
        """
        hidden, skip = layers.leave_input(hidden)
        skips = [skip]
        for block in self.down_blocks:
            for layer in _block_layers(block):
                layers.enter_input()
                hidden, skip = layers.leave_input(layers.run(layer, hidden))
                skips.append(skip)
            for downsampler in block.downsamplers or ():
                layers.enter_input()
                hidden, skip = layers.leave_input(downsampler(hidden))
                skips.append(skip)

        mid = self.mid_block
        layers.enter_middle()
        hidden = layers.run((mid.resnets[0], mid.temp_convs[0], None, None), hidden)
        for layer in zip(mid.attentions, mid.temp_attentions, mid.resnets[1:], mid.temp_convs[1:]):
            hidden = layers.attend(layer[0], layer[1], hidden)
            hidden = layers.run((layer[2], layer[3], None, None), hidden)
        hidden = layers.leave_middle(hidden, x, timesteps)

        for block in self.up_blocks:
            for layer in _block_layers(block):
                hidden = layers.run(layer, layers.enter_output(hidden, skips.pop()))
            for upsampler in block.upsamplers or ():
                hidden = upsampler(hidden, output_size=skips[-1].shape[2:])
        return hidden


def _block_layers(block: torch.nn.Module) -> zip:
    """(resnet, temporal convolution, spatial transformer or None, temporal transformer or None) of each layer."""
    nothing = (None,) * len(block.resnets)
    return zip(
        block.resnets,
        block.temp_convs,
        getattr(block, "attentions", nothing),
        getattr(block, "temp_attentions", nothing),
    )


class _Layers(LayerPass):
    """One pass over the layers of a 3-D UNet."""

    def run(self, layer: tuple, hidden: torch.Tensor) -> torch.Tensor:
        resnet, temporal_conv, spatial, temporal = layer
        hidden = temporal_conv(resnet(hidden, self.emb[: hidden.shape[0]]), self.num_frames)
        return hidden if spatial is None else self.attend(spatial, temporal, hidden)

    def attend(self, spatial, temporal, hidden: torch.Tensor) -> torch.Tensor:
        hidden = spatial(self.repeat(hidden), next(self.keys_values), self.options, self.context)
        hidden = temporal(hidden, self.num_frames, self.options)
        self.attended()
        return hidden


class ModelScopeUNet(BlockRunner, UNet3DConditionModel):
    """ModelScope text-to-video: `UNet3DConditionModel` called by ComfyUI."""

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **kwargs) -> torch.Tensor:
        """Predict the noise of a clip.

        Args:
            x: noisy latents (B, 4, F, h, w).
            timesteps: (B,), 0..999.
            context: text states (B, S, D); read when `text_keys_values` is absent.
            control, transformer_options: ComfyUI's.
            text_keys_values: what `project_text` returns for the text.
        """
        options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, control, options, **kwargs)

    def _forward(
        self, x, timesteps, context, control, transformer_options, text_keys_values=None, **kwargs
    ) -> torch.Tensor:
        num_frames = x.shape[2]
        start_pass(x, transformer_options)
        if text_keys_values is None:
            text_keys_values = self.project_text(context)
        emb = self.embed_time(timesteps, x, transformer_options)
        layers = self.start_layers(emb, text_keys_values, num_frames, transformer_options, context, control)
        distinct = x[: distinct_clips(x, timesteps, transformer_options, control)]
        hidden = self.transformer_in(self.conv_in(as_frames(distinct)), num_frames, transformer_options)
        hidden = self.run_blocks(hidden, layers, x, timesteps)
        hidden = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return as_clip(hidden, num_frames)
