"""Parts of a face by BiSeNet, and the face on white that they cut out.

Weights: parsing_bisenet.pth of xinntao/facexlib (Yu et al. 2018, arXiv 1808.00897; trained on CelebAMask-HQ).
"""

from dataclasses import dataclass

import numpy as np
import torch

from .extras import import_extra
from .torch_network import assign_weights, in_single, load_fully, managed, on_meta

CLASSES = 19
# CelebAMask-HQ labels that count as background: background, ears, ear rings, neck, necklace, cloth, hat. Hair (17) and
# face stay. Source: diffusers, pipelines/consisid/consisid_utils.py.
BACKGROUND_LABELS = (0, 7, 8, 9, 14, 15, 16, 18)
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class FaceOnWhite:
    """A face without what surrounds it: `color` and `grey`, both (1, 3, H, W), 0..1."""

    color: torch.Tensor
    grey: torch.Tensor


class FaceParser:
    """Labels of pixels by facexlib's BiSeNet.

    Args:
        state: the published file's tensors.
        source: what to call the file in an error.

    Raises:
        ImportError: facexlib is not installed.
        ValueError: weights of another network.
    """

    def __init__(self, state: dict[str, torch.Tensor], source: str):
        published = import_extra("facexlib.parsing.bisenet", "facexlib", "Face parsing")
        network = on_meta(lambda: published.BiSeNet(num_class=CLASSES))
        self.name = source
        self._patcher = managed(assign_weights(network, in_single(state), source))

    def labels(self, crop: np.ndarray) -> torch.Tensor:
        """Label of every pixel of a uint8 portrait crop (H, W, 3): (H, W), 0..18."""
        device = load_fully(self._patcher)
        pixels = channels_first(crop).to(device)
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
        return self._patcher.model((pixels - mean) / std)[0].argmax(dim=1)[0].cpu()


def face_on_white(crop: np.ndarray, labels: torch.Tensor) -> FaceOnWhite:
    """A portrait crop whose background labels are white.

    Args:
        crop: uint8 (H, W, 3).
        labels: (H, W), of `FaceParser`.
    """
    pixels = channels_first(crop)
    background = torch.isin(labels, torch.tensor(BACKGROUND_LABELS))
    white = torch.ones_like(pixels)
    return FaceOnWhite(torch.where(background, white, pixels), torch.where(background, white, grey(pixels)))


def grey(pixels: torch.Tensor) -> torch.Tensor:
    """Luminance of pictures (B, 3, H, W) in all three channels (ITU-R BT.601 weights)."""
    weights = pixels.new_tensor(LUMINANCE)[:, None, None]
    return (pixels * weights).sum(dim=1, keepdim=True).expand(-1, 3, -1, -1)


def channels_first(crop: np.ndarray) -> torch.Tensor:
    """A uint8 picture (H, W, 3) as (1, 3, H, W), 0..1."""
    return torch.from_numpy(np.array(crop)).movedim(-1, 0).unsqueeze(0).float() / 255
