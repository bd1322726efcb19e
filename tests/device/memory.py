"""What lies on the card: live tensors by storage, and host memory that is pinned."""

import gc
import weakref

import torch

# Addresses of host memory registered with CUDA -> bytes.
pinned: dict[int, int] = {}


class Lease:
    """Memory on the card that one tensor refers to; it lives as long as the tensor that has it as an attribute."""

    def __init__(self, held: torch.Tensor) -> None:
        self.storage = held.untyped_storage()
        self.description = f"{tuple(held.shape)} {held.dtype}"
        _alive.add(self)


_alive: weakref.WeakSet[Lease] = weakref.WeakSet()


def in_use() -> int:
    """Bytes of all storages on the card that a tensor still refers to."""
    storages = {lease.storage._cdata: lease.storage.nbytes() for lease in list(_alive)}
    return sum(storages.values())


def left_behind() -> list[str]:
    """Shapes and types of tensors that are still on the card, the largest first."""
    gc.collect()
    return [lease.description for lease in sorted(_alive, key=lambda lease: -lease.storage.nbytes())]
