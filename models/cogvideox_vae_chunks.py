"""diffusers' CogVideoX autoencoder, run over a clip in chunks of frames.

The published classes keep their parameters and key names; only how they run differs, in memory and speed:

- the last input frames that each causal convolution has seen pass from chunk to chunk in one `Chunk`, and are dropped
  as soon as they were used (layers without reach in time keep none);
- the 1x1x1 convolutions of the latents in spatially conditioned norms run at the latents' size, since they commute with
  nearest-neighbour enlargement;
- frames that temporal upsampling repeats are convolved once;
- convolutions read a few frames at a time, and activations change in place.

Group norm statistics are those of a chunk, so the partition is part of the result. It is diffusers': chunks of 2 latent
or 8 image frames, of which the first also takes the remainder (13 latent frames: 3, 2, 2, 2, 2, 2; 49 images: 9, 8, 8,
8, 8, 8; 13 images: 13).

In diffusers a layer tells from an odd number of frames that it sees the clip's first one, which alone stands for one
image. An even number of latent frames therefore decodes to 4 F' images there. Here the chunk says whether it is the
clip's first, so F' latent frames are 4 (F' - 1) + 1 images for every F'; for odd F' the results agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import comfy.model_management
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import (
    AutoencoderKLCogVideoX,
    CogVideoXCausalConv3d,
    CogVideoXDecoder3D,
    CogVideoXEncoder3D,
    CogVideoXResnetBlock3D,
    CogVideoXSafeConv3d,
    CogVideoXSpatialNorm3D,
)
from diffusers.models.downsampling import CogVideoXDownsample3D
from diffusers.models.upsampling import CogVideoXUpsample3D
from torch.nn.functional import interpolate, pad, silu

# A 3-D convolution copies what it reads: at most this many elements at once.
CONVOLUTION_ELEMENTS = 2**27


@dataclass
class Chunk:
    """Where a chunk lies in its clip, and what the causal convolutions have seen before it."""

    first: bool
    last: bool
    past: dict[torch.nn.Module, torch.Tensor] = field(default_factory=dict)


def chunk_bounds(frames: int, size: int) -> list[tuple[int, int]]:
    """Start and end of each chunk: `size` frames, in the first chunk also the remainder of `frames` / `size`.

    Fewer than `size` frames are one chunk.
    """
    first = min(frames, size + frames % size)
    return [(0, first), *((start, start + size) for start in range(first, frames, size))]


def _chunks(clip: torch.Tensor, size: int) -> Iterator[tuple[torch.Tensor, Chunk]]:
    bounds, past = chunk_bounds(clip.shape[2], size), {}
    for start, end in bounds:
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield clip[:, :, start:end], Chunk(first=start == 0, last=end == clip.shape[2], past=past)


def _activate(activation: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    return silu(hidden, inplace=True) if isinstance(activation, torch.nn.SiLU) else activation(hidden)


class CausalConv(CogVideoXCausalConv3d):
    """A convolution that reaches back in time; before the first frame lies that frame again."""

    def forward(self, inputs: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Convolve a chunk (B, C, F, h, w)."""
        reach, frames = self.time_kernel_size - 1, inputs.shape[2]
        past = inputs[:, :, :1].expand(-1, -1, reach, -1, -1) if chunk.first else chunk.past.pop(self)

        def window(start: int, end: int) -> torch.Tensor:
            """The frames that output frames `start` to `end` depend on."""
            begin = start - reach
            return inputs[:, :, begin:end] if begin >= 0 else torch.cat([past[:, :, begin:], inputs[:, :, :end]], dim=2)

        step = max(1, CONVOLUTION_ELEMENTS // inputs[:, :, 0].numel() - reach)
        output = inputs.new_empty(inputs.shape[0], self.conv.out_channels, *inputs.shape[2:])
        for start in range(0, frames, step):
            end = min(start + step, frames)
            output[:, :, start:end] = self.conv(window(start, end))
        if not chunk.last:
            chunk.past[self] = window(frames, frames).clone()
        return output


class SpatialNorm(CogVideoXSpatialNorm3D):
    """Group norm whose scale and shift the latents give, each latent value for the pixels and frames it covers."""

    def forward(self, hidden: torch.Tensor, latents: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """Normalize a chunk (B, C, F, H, W), of which `latents` (B, c, F', h, w) are the latents."""
        hidden = self.norm_layer(hidden)
        scale, shift = self.conv_y.conv(latents), self.conv_b.conv(latents)
        alone = 1 if chunk.first else 0
        covered = (hidden.shape[2] - alone) // max(1, latents.shape[2] - alone)
        end = 0
        for index in range(latents.shape[2]):
            start, end = end, end + (1 if index < alone else covered)
            frames, size = hidden[:, :, start:end], hidden.shape[3:]
            frames.mul_(interpolate(scale[:, :, index], size)[:, :, None])
            frames.add_(interpolate(shift[:, :, index], size)[:, :, None])
        return hidden


class ResnetBlock(CogVideoXResnetBlock3D):
    """Two norms, activations and causal convolutions beside a shortcut."""

    def forward(self, inputs: torch.Tensor, latents: torch.Tensor | None, chunk: Chunk) -> torch.Tensor:
        """Transform a chunk (B, C, F, h, w); `latents` is None in the encoder."""
        hidden = self._normalize(self.norm1, inputs, latents, chunk)
        hidden = self.conv1(hidden, chunk)
        hidden = self._normalize(self.norm2, hidden, latents, chunk)
        hidden = self.conv2(hidden, chunk)
        return hidden.add_(inputs if self.in_channels == self.out_channels else self.conv_shortcut(inputs))

    def _normalize(self, norm, hidden, latents, chunk) -> torch.Tensor:
        hidden = norm(hidden) if latents is None else norm(hidden, latents, chunk)
        return _activate(self.nonlinearity, hidden)


class Downsample(CogVideoXDownsample3D):
    """Halves height and width, and the frames after the clip's first where time is compressed."""

    def forward(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """(B, C, F, h, w) -> (B, C, F, h / 2, w / 2) or with half the frames."""
        alone, step = (1 if chunk.first else 0), (2 if self.compress_time else 1)
        starts = [0] * alone + list(range(alone, hidden.shape[2], step))
        ends = [start + (1 if index < alone else step) for index, start in enumerate(starts)]
        frames = (hidden[:, :, start:end].mean(2) for start, end in zip(starts, ends))
        return torch.stack([self.conv(pad(frame, (0, 1, 0, 1))) for frame in frames], dim=2)


class Upsample(CogVideoXUpsample3D):
    """Doubles height and width, and the frames after the clip's first where time is compressed."""

    def forward(self, hidden: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """(B, C, F, h, w) -> (B, C, F, 2 h, 2 w) or with twice the frames."""
        repeats = [2 if self.compress_time else 1] * hidden.shape[2]
        if chunk.first:
            repeats[0] = 1
        height, width = hidden.shape[3:]
        output = hidden.new_empty(hidden.shape[0], self.conv.out_channels, sum(repeats), 2 * height, 2 * width)
        end = 0
        for frame, count in zip(hidden.unbind(2), repeats):
            start, end = end, end + count
            output[:, :, start:end] = self.conv(interpolate(frame, scale_factor=2.0))[:, :, None]
        return output


class Encoder(CogVideoXEncoder3D):
    """Images of a chunk -> mean and log variance side by side."""

    def forward(self, images: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """(B, 3, F, H, W) -> (B, 2 c, F', h, w)."""
        hidden = self.conv_in(images, chunk)
        for block in (*self.down_blocks, self.mid_block):
            for resnet in block.resnets:
                hidden = resnet(hidden, None, chunk)
            for downsampler in getattr(block, "downsamplers", None) or ():
                hidden = downsampler(hidden, chunk)
        return self.conv_out(_activate(self.conv_act, self.norm_out(hidden)), chunk)


class Decoder(CogVideoXDecoder3D):
    """Latents of a chunk -> images."""

    def forward(self, latents: torch.Tensor, chunk: Chunk) -> torch.Tensor:
        """(B, c, F', h, w) -> (B, 3, F, H, W)."""
        hidden = self.conv_in(latents, chunk)
        for block in (self.mid_block, *self.up_blocks):
            for resnet in block.resnets:
                hidden = resnet(hidden, latents, chunk)
            for upsampler in getattr(block, "upsamplers", None) or ():
                hidden = upsampler(hidden, chunk)
        return self.conv_out(_activate(self.conv_act, self.norm_out(hidden, latents, chunk)), chunk)


class ChunkedAutoencoder(AutoencoderKLCogVideoX):
    """The autoencoder as ComfyUI's VAE calls it; its layers have to be adopted with `replacements`."""

    # ComfyUI's patcher sets it; the base class has a read-only property.
    device: torch.device | None = None

    def moments(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, 4 k + 1, H, W) in -1..1 -> mean and log variance (B, 2 c, k + 1, h, w)."""
        parts = [self.encoder(part, chunk) for part, chunk in _chunks(images, self.num_sample_frames_batch_size)]
        return torch.cat(parts if self.quant_conv is None else [self.quant_conv(part) for part in parts], dim=2)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, 4 k + 1, H, W) in -1..1 -> the posterior's mode (B, c, k + 1, h, w)."""
        return self.moments(images).chunk(2, dim=1)[0]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, c, F', h, w) -> images (B, 3, 4 (F' - 1) + 1, H, W), about -1..1."""
        latents = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        parts = [self.decoder(part, chunk) for part, chunk in _chunks(latents, self.num_latent_frames_batch_size)]
        return torch.cat(parts, dim=2)


def replacements(operations: type) -> dict[type, type]:
    """Classes for `adopt`: how the published layers run in chunks.

    Args:
        operations: the same `comfy.ops` namespace.
    """
    return {
        CogVideoXSafeConv3d: operations.Conv3d,
        CogVideoXCausalConv3d: CausalConv,
        CogVideoXSpatialNorm3D: SpatialNorm,
        CogVideoXResnetBlock3D: ResnetBlock,
        CogVideoXDownsample3D: Downsample,
        CogVideoXUpsample3D: Upsample,
        CogVideoXEncoder3D: Encoder,
        CogVideoXDecoder3D: Decoder,
    }
