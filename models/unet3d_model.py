"""What ComfyUI has to know about every 3-D UNet of this pack."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from .base import VideoModel
from .transformer import DEVICE_ROWS

MEASURED_CHANNELS = 320
# Tokens of a CLIP text encoder.
TEXT_TOKENS = 77


class Peak(NamedTuple):
    """A place of the network where the memory of a call may peak, counted at the published width of 320 channels.

    Tests count the peaks again.

    Args:
        kept: elements alive per latent position.
        positions: latent positions per row of the feed-forward layer at work; a level halves both sides.
        row: elements per row that is in work at once.
    """

    kept: float
    positions: int = 1
    row: float = 0


class UNet3DModel(VideoModel):
    """A `VideoModel` over a 3-D UNet, of diffusers' layers unless a subclass has other peaks."""

    # attention over frames at full size; the feed-forward layers of `transformer_in`, and of the second level
    peaks: tuple[Peak, ...] = (Peak(4490), Peak(2175, 1, 8192), Peak(2640, 4, 10240))
    # conditioning that holds the keys and values of the text
    text_keys_values = "text_keys_values"

    def call_elements(self, input_shape: Sequence[int]) -> float:
        """Elements of activations at the peak of a call for latents of `input_shape`."""
        positions = input_shape[0] * math.prod(input_shape[2:])
        width = self.model_config.unet_config["model_channels"] / MEASURED_CHANNELS
        rows = (min(positions / peak.positions, DEVICE_ROWS) for peak in self.peaks)
        return width * max(peak.kept * positions + peak.row * in_work for peak, in_work in zip(self.peaks, rows))

    def kept_elements(self, input_shape: Sequence[int]) -> dict[str, float]:
        """Keys and values of the text."""
        return {self.text_keys_values: TEXT_TOKENS * self.diffusion_model.text_width}

    def extra_conds_shapes(self, **kwargs) -> dict:
        """Shapes of conditioning that `memory_required` counts, of one prompt."""
        shapes, text = super().extra_conds_shapes(**kwargs), kwargs.get("cross_attn")
        if text is not None:
            shapes[self.text_keys_values] = [text.shape[0], text.shape[1], self.diffusion_model.text_width]
        return shapes
