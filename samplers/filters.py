"""Low-pass filters over the frames and pixels of a clip, and the exchange of low frequencies between two clips.

Filters and mixing are those of FreeInit (Wu et al. 2023, arXiv 2312.07537) and of FrameInit (Ren et al. 2024,
arXiv 2402.04324).
"""

import dataclasses

import comfy.model_management
import torch

KINDS = ("gaussian", "butterworth", "ideal", "box")
AXES = (-3, -2, -1)


@dataclasses.dataclass(frozen=True)
class LowPass:
    """Which frequencies pass.

    Args:
        kind: one of `KINDS`.
        order: steepness of the butterworth filter, above 0; the other kinds ignore it.
        spatial_stop: stop frequency along height and width, 0..1 of the highest one.
        temporal_stop: stop frequency along the frames, 0..1. When either stop frequency is 0, nothing passes.

    Raises:
        ValueError: an unknown kind, or a value outside its range.
    """

    kind: str = "gaussian"
    order: float = 4
    spatial_stop: float = 0.25
    temporal_stop: float = 0.25

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"Unknown filter {self.kind!r}. Choose one of: {', '.join(KINDS)}.")
        if not self.order > 0:
            raise ValueError(f"The filter's order is {self.order}. Choose a value above 0, such as 4.")
        for name in ("spatial_stop", "temporal_stop"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"{name} is {value}. Choose a value from 0 (nothing passes) to 1 (up to the highest frequency)."
                )

    def mask(self, shape: tuple[int, int, int], device: torch.device | str = "cpu") -> torch.Tensor:
        """The share of each frequency that passes, (T, H, W) float32 in 0..1; frequency 0 is at index size // 2.

        Args:
            shape: (T, H, W), the clip's frames, height and width.
            device: where to put it.
        """
        if self.spatial_stop == 0 or self.temporal_stop == 0:
            return torch.zeros(shape, device=device)
        if self.kind == "box":
            return self._box(shape).to(device)
        squares = self._squared_distances(shape)
        if self.kind == "gaussian":
            mask = torch.exp(-1 / (2 * self.spatial_stop**2) * squares)
        elif self.kind == "butterworth":
            mask = 1 / (1 + (squares / self.spatial_stop**2) ** self.order)
        else:
            # A squared distance against twice the frequency: so it was published.
            mask = squares <= 2 * self.spatial_stop
        return mask.to(device, torch.float32)

    def _squared_distances(self, shape: tuple[int, int, int]) -> torch.Tensor:
        """Squared distance of each frequency from 0, (T, H, W) float64, time stretched by the stops' ratio."""
        time, height, width = (2 * torch.arange(size, dtype=torch.float64) / size - 1 for size in shape)
        time = self.spatial_stop / self.temporal_stop * time
        return time.square()[:, None, None] + height.square()[:, None] + width.square()

    def _box(self, shape: tuple[int, int, int]) -> torch.Tensor:
        """Ones in a box around frequency 0. Its width follows the height of the clip: so it was published."""
        reach = round(shape[1] // 2 * self.spatial_stop)
        reaches = (round(shape[0] // 2 * self.temporal_stop), reach, reach)
        time, height, width = (_around_centre(size, reach) for size, reach in zip(shape, reaches))
        return (time[:, None, None] & height[:, None] & width).float()


def mix_low_high(low: torch.Tensor, high: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The low frequencies of one clip with the high frequencies of another.

    Args:
        low: (..., T, H, W), real; its frequencies that pass the mask are taken.
        high: same shape; its frequencies that do not pass are taken.
        mask: (T, H, W) as of `LowPass.mask`; any sizes, odd ones too.

    Returns:
        (..., T, H, W) in the dtype and on the device of `high`, computed in float32 or better; on the CPU unless that
        device is of CUDA's kind: others lack complex numbers or Fourier transforms of some sizes.

    Raises:
        ValueError: shapes that differ.
    """
    if low.shape != high.shape or mask.shape != high.shape[-3:]:
        raise ValueError(
            f"Low frequencies of {tuple(low.shape)}, high frequencies of {tuple(high.shape)} and a filter of "
            f"{tuple(mask.shape)} do not fit together. Give two tensors of one shape and a filter of its last three "
            "sizes."
        )
    dtype = torch.promote_types(high.dtype, torch.float32)
    device = high.device if comfy.model_management.is_device_cuda(high.device) else "cpu"
    base = high.to(device, dtype)
    # The transform is linear: low * mask + high * (1 - mask) = high + (low - high) * mask, with one transform less.
    spectrum = torch.fft.fftn(low.to(base) - base, dim=AXES) * torch.fft.ifftshift(mask.to(base), dim=AXES)
    return (base + torch.fft.ifftn(spectrum, dim=AXES).real).to(high)


def _around_centre(size: int, reach: int) -> torch.Tensor:
    """(size,) bool: the indices from `reach` before the centre up to `reach` after it, the last one excluded."""
    offsets = torch.arange(size) - size // 2
    return (offsets >= -reach) & (offsets < reach)
