"""FreeU as a patch of ComfyUI's UNet (Stable Diffusion 1.x, 2.x and XL).

FreeU (Si et al. 2023, arXiv 2309.11497) with constant factors, on the layers that diffusers applies it to: those of the
first two up-blocks, in Stable Diffusion XL output blocks 0-2 and 3-5. ComfyUI's own FreeU node goes by the number of
channels instead and takes 0-3 and 4-6.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import comfy.model_patcher
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

LARGEST = 10.0
STAGES = 2


class Stage(NamedTuple):
    """Factors of one up-block.

    Args:
        backbone: of the first half of the channels that come from the layer before.
        skip: of the lowest frequencies of what comes from the input side.
    """

    backbone: float
    skip: float


def install_free_u(
    model: comfy.model_patcher.ModelPatcher, b1: float = 1.1, b2: float = 1.2, s1: float = 0.6, s2: float = 0.4
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with FreeU; the default values are those of StoryDiffusion.

    A factor of 1 leaves its tensors as they are. 0 is a factor as well; diffusers takes it for FreeU off.

    Args:
        model: a Stable Diffusion 1.x, 2.x or XL.
        b1, b2: 0..10, factor of the backbone in the first and second up-block.
        s1, s2: 0..10, factor of the skips' low frequencies in the first and second up-block.

    Raises:
        ValueError: a model that is no such UNet, or a factor outside its range. While sampling: a patch installed
            before this one that leaves no skip.
    """
    for name, value in {"b1": b1, "b2": b2, "s1": s1, "s2": s2}.items():
        if not 0 <= value <= LARGEST:
            raise ValueError(f"FreeU: {name} is {value}. Choose a value from 0 to {LARGEST:g}; 1 changes nothing.")
    up_blocks = zip(output_block_numbers(model), (Stage(b1, s1), Stage(b2, s2)))
    stages = {number: stage for numbers, stage in up_blocks for number in numbers}
    model = model.clone()
    model.set_model_output_block_patch(_output_block_patch(stages))
    return model


def output_block_numbers(model: comfy.model_patcher.ModelPatcher) -> list[range]:
    """Numbers of the UNet's output blocks that make up its first two up-blocks, as diffusers groups them.

    Raises:
        ValueError: a model that is no UNet of Stable Diffusion.
    """
    network = model.model.diffusion_model
    if not isinstance(network, UNetModel):
        raise ValueError(
            f"FreeU works with Stable Diffusion 1.x, 2.x and XL; {type(model.model).__name__} has no UNet with output "
            "blocks. Load one of those checkpoints."
        )
    numbers, start = [], 0
    for resnets in network.num_res_blocks[::-1][:STAGES]:
        # An up-block has one layer more than the down-block of its level: that of the down-block's own input.
        numbers.append(range(start, start + resnets + 1))
        start = numbers[-1].stop
    return numbers


def scale_backbone(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Features (B, C, H, W) with their first C // 2 channels multiplied; the tensor itself for a factor of 1."""
    if factor == 1:
        return features
    half = features.shape[1] // 2
    return torch.cat((features[:, :half] * factor, features[:, half:]), dim=1)


def scale_low_frequencies(features: torch.Tensor, factor: float) -> torch.Tensor:
    """Features with their lowest frequencies multiplied: 0 and -1 (one wave over the picture) along either axis.

    This is the published filter with threshold 1: the two by two values at the centre of a shifted spectrum change,
    their mirror images do not, and the real part is taken. So few values come from products with cosines and sines,
    which every device computes for any size; Fourier transforms are missing on some.

    Args:
        features: (B, C, H, W), real.
        factor: see above.

    Returns:
        (B, C, H, W) in the dtype of `features`, computed in float32 or better; the tensor itself for a factor of 1.
    """
    if factor == 1:
        return features
    dtype = torch.promote_types(features.dtype, torch.float32)
    waves = _lowest_waves(*features.shape[-2:], dtype, features.device)
    pixels = features.to(dtype).reshape(-1, waves.shape[1])
    changed = torch.addmm(pixels, pixels @ waves.T, waves, alpha=(factor - 1) / waves.shape[1])
    return changed.reshape(features.shape).to(features.dtype)


def _lowest_waves(height: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Cosines and sines (2 * k, H * W) of the lowest k frequencies, 4, or fewer for one row or column."""
    down = torch.arange(height, dtype=dtype, device=device)[:, None] * (2 * math.pi / height)
    across = torch.arange(width, dtype=dtype, device=device) * (2 * math.pi / width)
    angles = [i * down + j * across for i in range(min(2, height)) for j in range(min(2, width))]
    angles = torch.stack(angles).flatten(1)
    return torch.cat((angles.cos(), angles.sin()))


def _output_block_patch(stages: Mapping[int, Stage]) -> Callable:
    """ComfyUI's patch of (backbone, skip, transformer options) before an output block joins them."""

    def patch(backbone: torch.Tensor, skip: torch.Tensor | None, options: dict):
        _, number = options["block"]
        if number not in stages:
            return backbone, skip
        if skip is None:
            raise ValueError(
                f"FreeU finds no skip at output block {number}: a patch of the model that runs before FreeU has used "
                "it. Put FreeU before the node that installs that patch."
            )
        stage = stages[number]
        return scale_backbone(backbone, stage.backbone), scale_low_frequencies(skip, stage.skip)

    return patch
