"""comfy-aimdo on the simulated card: address space for all weights of a model, with memory behind a share of it."""

import ctypes
import os

import comfy_aimdo.control
import comfy_aimdo.host_buffer
import comfy_aimdo.model_vbar
import comfy_aimdo.torch
import comfy_aimdo.vram_buffer
import torch

from . import tensors

# Garbage that fresh memory on the card holds: weights that are computed with before they arrive show.
GARBAGE = 0xAB
# Multiples of it, modulo 1, spread evenly: a share of the layers, not the first ones, has room.
GOLDEN = 0.6180339887
# Of the layers that find room on the card, set by `install`.
_share = 1.0
# Layers that are in use and must not be evicted -> how often.
pins: dict["Room", int] = {}


class Room:
    """Address space of one layer's weights."""

    def __init__(self, size: int, has_memory: bool) -> None:
        self.size = size
        self.has_memory = has_memory
        self.content: torch.Tensor | None = None
        self.generation = 0

    def evict(self) -> int:
        """Give the memory back; returns the bytes, 0 if there were none or the layer is in use."""
        if self.content is None or pins.get(self):
            return 0
        self.content = None
        self.generation += 1
        return self.size


class ModelVBAR:
    """Stands for comfy-aimdo's class of the name."""

    def __init__(self, size: int, device: int) -> None:
        self.rooms: list[Room] = []

    def alloc(self, size: int) -> Room:
        self.rooms.append(Room(size, len(self.rooms) * GOLDEN % 1 < _share))
        return self.rooms[-1]

    def prioritize(self, *_) -> None:
        pass

    def loaded_size(self) -> int:
        return sum(room.size for room in self.rooms if room.content is not None)

    def free_memory(self, size: int) -> int:
        return sum(room.evict() for room in self.rooms)


class VRAMBuffer:
    """Memory on the card that weights without room pass through; it grows and is written over and over."""

    def __init__(self, *_) -> None:
        self.content: torch.Tensor | None = None

    def size(self) -> int:
        return 0 if self.content is None else self.content.numel()

    def get(self, size: int, offset: int = 0) -> torch.Tensor:
        if self.size() < offset + size:
            grown = _garbage(offset + size)
            if self.content is not None:
                grown[: self.size()] = self.content
            self.content = grown
        return self.content[offset : offset + size]


class HostBuffer:
    """Pinned memory; without a driver there is none."""

    def __init__(self, *_) -> None:
        self.size = 0

    def extend(self, *_, **__) -> None:
        raise RuntimeError("The simulated driver pins no memory.")

    def truncate(self, *_, **__) -> None:
        pass


def install(share: float) -> None:
    """Put comfy-aimdo's functions on the simulated card into this process.

    Args:
        share: of the layers that find room on the card, 0 to 1.
    """
    global _share
    _share = share
    vbar = comfy_aimdo.model_vbar
    vbar.ModelVBAR = ModelVBAR
    vbar.vbar_fault, vbar.vbar_unpin = _fault, _unpin
    vbar.vbar_signature_compare = lambda first, second: first is not None and first == second
    vbar.vbars_analyze = lambda *_: 0
    vbar.vbars_reset_watermark_limits = lambda *_: None
    comfy_aimdo.vram_buffer.VRAMBuffer = VRAMBuffer
    comfy_aimdo.host_buffer.HostBuffer = HostBuffer
    comfy_aimdo.host_buffer.read_file_to_device = _read_file
    comfy_aimdo.torch.aimdo_to_tensor = lambda found, device: found.content if isinstance(found, Room) else found


def maps_files() -> bool:
    """Whether comfy-aimdo's library, which maps safetensors files, works on this system."""
    return comfy_aimdo.control.init()


def _fault(room: Room) -> int | None:
    """Use a layer's memory: its generation, or None if the card has no room for it."""
    if not room.has_memory:
        return None
    pins[room] = pins.get(room, 0) + 1
    if room.content is None:
        room.content = _garbage(room.size)
    return room.generation


def _unpin(room: Room) -> None:
    count = pins.pop(room, 0) - 1
    if count > 0:
        pins[room] = count


def _garbage(size: int) -> torch.Tensor:
    return torch.full((size,), GARBAGE, dtype=torch.uint8, device=tensors.CARD)


def _read_file(
    file: int, offset: int, size: int, stream: int, address: int, device: int, mark_cold: bool = True
) -> None:
    """Read from a file straight into the card's memory."""
    target = memoryview((ctypes.c_uint8 * size).from_address(address)).cast("B")
    done = 0
    while done < size:
        read = os.preadv(file, [target[done:]], offset + done)
        if read <= 0:
            raise RuntimeError("The file ended before the tensor did.")
        done += read
