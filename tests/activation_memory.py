"""Measures the activations of a network on the meta device: no arithmetic, any size."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class ActivationPeak(TorchDispatchMode):
    """Tracks the bytes of tensors that come into being inside the block; `peak` is the most that was alive at once.

    Args:
        weights: a network whose weights do not count, when a view of one comes up.
    """

    def __init__(self, weights: torch.nn.Module | None = None):
        super().__init__()
        tensors = () if weights is None else (*weights.parameters(), *weights.buffers())
        self.known = {storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in tensors)}
        self.alive = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._track(tensor.untyped_storage())
        self.peak = max(self.peak, sum(self.alive.values()))
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive and key not in self.known:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
