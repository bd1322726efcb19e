"""The weights of several layers at the same time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import comfy.ops
import torch


@contextmanager
def held_weights(
    layers: Sequence[torch.nn.Module], like: torch.Tensor
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor | None]]]:
    """Fetch the weight and the bias of each layer, on the device and in the type of `like`, until the block is left.

    ComfyUI streams weights through one buffer per offload stream, and there may be one stream: a weight is whole only
    until the next one is fetched. All weights but the last are therefore copied out of such a buffer.

    Args:
        layers: `comfy.ops` layers.
        like: what the weights are computed with.
    """
    held, releases = [], []
    try:
        for layer in layers:
            weight, bias, origin = comfy.ops.cast_bias_weight(layer, like, offloadable=True)
            release = (layer, weight, bias, origin)
            if layer is not layers[-1] and _is_in_a_buffer(origin):
                weight, bias = weight.clone(), None if bias is None else bias.clone()
                comfy.ops.uncast_bias_weight(*release)
            else:
                releases.append(release)
            held.append((weight, bias))
        yield held
    finally:
        for release in releases:
            comfy.ops.uncast_bias_weight(*release)


def _is_in_a_buffer(origin: tuple | None) -> bool:
    """Whether what `comfy.ops.cast_bias_weight` fetched came over an offload stream, whose buffer it uses."""
    return origin is not None and origin[0] is not None
