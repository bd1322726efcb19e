"""2-D convolutions of few pixels with large kernels, on a CPU."""

import comfy.model_management
import torch
from torch.nn.functional import pad

# A CPU convolution first copies its kernel into another order. Past 32 MiB, the most that malloc keeps back, the copy
# lies in memory fresh from the system at each call. With few output pixels that takes most of the time, and one matrix
# product with the kernel as it lies is up to twice as fast. Measured: fp32 kernels of 15 to 118 MB, 64 to 256 pixels.
LARGE_KERNEL_BYTES = 32 * 2**20
KERNEL_BYTES_PER_PIXEL = 300_000


class FewPixelConvolution:
    """Mixin for `comfy.ops` Conv2d classes: the same convolution, as one matrix product where that is faster."""

    def _conv_forward(self, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Convolve (N, C, h, w) with a kernel that ComfyUI has fetched, cast and patched."""
        if not comfy.model_management.is_device_cpu(input.device) or not self._suits(input, weight):
            return super()._conv_forward(input, weight, bias)
        windows = pad(input, (self.padding[1], self.padding[1], self.padding[0], self.padding[0]))
        for axis in (0, 1):
            windows = windows.unfold(2 + axis, self.kernel_size[axis], self.stride[axis])
        count, _, height, width = windows.shape[:4]
        columns = windows.permute(0, 2, 3, 1, 4, 5).reshape(count * height * width, -1).t()
        flat = weight.flatten(1) @ columns if bias is None else torch.addmm(bias[:, None], weight.flatten(1), columns)
        return flat.view(-1, count, height, width).transpose(0, 1).contiguous()

    def _suits(self, input: torch.Tensor, weight: torch.Tensor) -> bool:
        plain = self.groups == 1 and self.dilation == (1, 1) and self.padding_mode == "zeros"
        if weight.nbytes < LARGE_KERNEL_BYTES or not plain or input.ndim != 4 or isinstance(self.padding, str):
            return False
        pixels = input.shape[0]
        for axis in (0, 1):
            reach = input.shape[2 + axis] + 2 * self.padding[axis] - self.kernel_size[axis]
            pixels *= reach // self.stride[axis] + 1
        return 0 < pixels <= weight.nbytes // KERNEL_BYTES_PER_PIXEL
