"""What CUDA refuses although a CPU computes it, and which operations make the host wait."""

import torch

# Operations whose result, or its shape, the host has to know.
HOST_READS = frozenset(
    f"aten::{name}"
    for name in (
        "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere",
        "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2", "bincount", "one_hot",
    )
)  # fmt: skip
INDEXING = frozenset(f"aten::{name}" for name in ("index", "index_put", "index_put_", "_index_put_impl_"))
# Operations that change the shape of their argument, which a simulated tensor cannot.
RESHAPING_IN_PLACE = frozenset(
    f"aten::{name}" for name in ("resize_", "set_", "squeeze_", "swapaxes_", "t_", "transpose_", "unsqueeze_")
)
# Operations that take no scalar of the host in place of a tensor.
TENSORS_ONLY = frozenset(
    f"aten::{name}" for name in ("addmm", "baddbmm", "bmm", "cat", "convolution", "linear", "matmul", "mm", "stack")
)
ONE_TYPE = frozenset(
    f"aten::{name}"
    for name in (
        "addmm", "baddbmm", "bmm", "conv1d", "conv2d", "conv3d", "convolution", "group_norm", "layer_norm", "linear",
        "matmul", "mm", "native_group_norm", "native_layer_norm", "scaled_dot_product_attention",
    )
)  # fmt: skip


def check_devices(name: str, host_tensors: list[torch.Tensor]) -> None:
    """Raise as CUDA does for an operation that meets tensors of the host beside tensors on the card."""
    strangers = [tensor for tensor in host_tensors if tensor.ndim or name in TENSORS_ONLY]
    if strangers:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
            f"({name}; on the cpu: {[tuple(tensor.shape) for tensor in strangers]})"
        )


def check_types(name: str, tensors: list[torch.Tensor]) -> None:
    """Raise as CUDA does for an operation that takes one floating-point type only."""
    types = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} if name in ONE_TYPE else ()
    if len(types) > 1:
        raise RuntimeError(f"{name}: expected tensors of the same type, found {sorted(map(str, types))}")


def reads_positions(name: str, indices: list, values: torch.Tensor | None) -> bool:
    """Whether indexing by these tensors makes the host find out which positions a mask selects."""
    masks = [index for index in indices if index is not None and index.dtype in (torch.bool, torch.uint8)]
    fills = name != "aten::index" and values is not None and values.numel() == 1 and len(masks) == len(indices) == 1
    return bool(masks) and not fills
