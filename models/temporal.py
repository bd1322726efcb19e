"""The layers of diffusers' 3-D UNets that mix frames."""

import torch
from diffusers.models.resnet import TemporalConvLayer
from diffusers.models.transformers.transformer_temporal import TransformerTemporalModel
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLTransformerTemporalEncoder


def as_clip(frames: torch.Tensor, num_frames: int) -> torch.Tensor:
    """View frames (B * F, C, h, w) as clips (B, C, F, h, w)."""
    return frames.unflatten(0, (-1, num_frames)).transpose(1, 2)


def as_frames(clip: torch.Tensor) -> torch.Tensor:
    """Fold clips (B, C, F, h, w) into frames (B * F, C, h, w)."""
    return clip.transpose(1, 2).flatten(0, 1)


class TemporalConv(TemporalConvLayer):
    """Four convolutions over time with a residual connection."""

    def forward(self, hidden: torch.Tensor, num_frames: int) -> torch.Tensor:
        """Convolve frames (B * F, C, h, w) along F."""
        clip = as_clip(hidden, num_frames)
        for convolution in (self.conv1, self.conv2, self.conv3, self.conv4):
            clip = convolution(clip)
        return hidden + as_frames(clip)


class TemporalTransformer(TransformerTemporalModel):
    """Two self-attentions over the frames of each pixel."""

    def forward(self, hidden: torch.Tensor, num_frames: int, transformer_options: dict | None = None) -> torch.Tensor:
        """Transform frames (B * F, C, h, w); every pixel attends along F."""
        _, channels, height, width = hidden.shape
        clip = self.norm(as_clip(hidden, num_frames))
        tokens = self.proj_in(clip.permute(0, 3, 4, 2, 1).reshape(-1, num_frames, channels))
        for block in self.transformer_blocks:
            tokens = tokens + block.attn1(block.norm1(tokens), transformer_options=transformer_options)
            tokens = tokens + block.attn2(block.norm2(tokens), transformer_options=transformer_options)
            tokens = tokens + block.ff(block.norm3(tokens))
        tokens = self.proj_out(tokens).view(-1, height, width, num_frames, channels)
        return hidden + tokens.permute(0, 3, 4, 1, 2).flatten(0, 1)


class PictureEncoder(I2VGenXLTransformerTemporalEncoder):
    """I2VGen-XL's encoder of the picture planes: one self-attention over the frames of each pixel."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Transform pixels (N, F, C)."""
        pixels = pixels + self.attn1(self.norm1(pixels))
        hidden = pixels
        for layer in self.ff.net:
            hidden = layer(hidden)
        return pixels + hidden
