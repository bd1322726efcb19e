"""What lies on the card: live tensors by storage, and host memory that is pinned."""

import gc
import weakref

import torch

# Addresses of host memory that was registered with CUDA and not taken back -> bytes.
registered: dict[int, int] = {}
# Addresses of host tensors that were made pinned.
_pinned: set[int] = set()


class Lease:
    """Memory on the card that one tensor refers to; it lives as long as the tensor that has it as an attribute."""

    def __init__(self, held: torch.Tensor) -> None:
        self.storage = held.untyped_storage()
        self.description = f"{tuple(held.shape)} {held.dtype}"
        _alive.add(self)


_alive: weakref.WeakSet[Lease] = weakref.WeakSet()


def pin(tensor: torch.Tensor) -> None:
    """Remember a tensor of the host as pinned until it is freed."""
    address = tensor.data_ptr()
    _pinned.add(address)
    weakref.finalize(tensor.untyped_storage(), _pinned.discard, address)


def is_pinned(tensor: torch.Tensor) -> bool:
    """Whether copies between this tensor of the host and the card need no wait."""
    return tensor.data_ptr() in registered or tensor.data_ptr() in _pinned


def in_use() -> int:
    """Bytes of all storages on the card that a tensor still refers to."""
    storages = {lease.storage._cdata: lease.storage.nbytes() for lease in list(_alive)}
    return sum(storages.values())


def left_behind() -> list[str]:
    """Shapes and types of tensors that are still on the card, the largest first."""
    gc.collect()
    return [lease.description for lease in sorted(_alive, key=lambda lease: -lease.storage.nbytes())]
