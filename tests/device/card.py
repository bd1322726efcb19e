"""`torch.cuda` of the simulated card: an NVIDIA card of the Ada generation, with streams that run at once."""

import contextlib
from types import SimpleNamespace

import torch

from . import memory, tensors, waits

GENERATION = (8, 9)
NAME = "Simulated card"
GIB = 2**30
WITHOUT_EFFECT = (
    "init", "_lazy_init", "set_device", "empty_cache", "ipc_collect", "manual_seed", "manual_seed_all",
    "set_rng_state", "set_rng_state_all",
)  # fmt: skip
# Bytes of the card.
capacity = 24 * GIB


class Stream:
    """A stream whose work ends when it is queued."""

    def __init__(self, device=None, priority: int = 0, **_) -> None:
        self.device = tensors.CARD
        self.cuda_stream = 0

    def synchronize(self) -> None:
        waits.note("stream.synchronize")

    def wait_stream(self, other: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def query(self) -> bool:
        return True


class Event:
    """A mark in a stream."""

    def __init__(self, *_, **__) -> None:
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        waits.note("event.synchronize")

    def query(self) -> bool:
        waits.note("event.query")
        return True

    def elapsed_time(self, other: "Event") -> float:
        return 0.0


def install() -> None:
    """Install the simulated card in this process, for as long as it runs."""
    torch._C._ensureCUDADeviceGuardSet()
    main = Stream()
    replaced = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: GENERATION,
        "get_device_properties": lambda *_: _properties(),
        "get_allocator_backend": lambda: "native",
        "is_bf16_supported": lambda *_, **__: True,
        "mem_get_info": lambda *_: (capacity - memory.in_use(), capacity),
        "memory_stats": lambda *_: {"active_bytes.all.current": 0, "reserved_bytes.all.current": 0},
        "memory_allocated": lambda *_: memory.in_use(),
        "synchronize": lambda *_: waits.note("torch.cuda.synchronize"),
        "current_stream": lambda *_: main,
        "default_stream": lambda *_: main,
        "stream": lambda _: contextlib.nullcontext(),
        "device": lambda _: contextlib.nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "cudart": lambda: SimpleNamespace(cudaHostRegister=_register, cudaHostUnregister=_unregister),
        "get_rng_state": lambda *_: torch.zeros(1, dtype=torch.uint8),
        "get_rng_state_all": list,
        "_is_in_bad_fork": lambda: False,
    }
    # torch.compile keeps a table of these functions and refuses one that stands under two names.
    replaced |= {name: _does_nothing() for name in WITHOUT_EFFECT}
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    torch.backends.cudnn.version = lambda: 92400
    _build_on_host_first()


def _does_nothing():
    return lambda *_, **__: None


def _properties() -> SimpleNamespace:
    major, minor = GENERATION
    return SimpleNamespace(
        name=NAME,
        total_memory=capacity,
        major=major,
        minor=minor,
        multi_processor_count=64,
        gcnArchName="",
        warp_size=32,
        L2_cache_size=2**22,
    )


def _register(address: int, size: int, flags: int) -> int:
    memory.registered[address] = size
    return 0


def _unregister(address: int) -> int:
    return 0 if memory.registered.pop(address, None) is not None else 1


def _build_on_host_first() -> None:
    """Let the functions that make tensors of Python's numbers, which no dispatcher sees, copy them to the card."""
    for name in ("tensor", "as_tensor", "asarray"):
        setattr(torch, name, _copied_to_the_card(getattr(torch, name)))


def _copied_to_the_card(build):
    def built(data, *args, device=None, **kwargs):
        if not tensors.is_card(device) and not isinstance(data, tensors.DeviceTensor):
            return build(data, *args, device=device, **kwargs)
        if isinstance(data, torch.Tensor):
            dtype = args[0] if args else kwargs.get("dtype")
            copied = data.clone() if build.__name__ == "tensor" else data
            return copied.to(device=data.device if device is None else device, dtype=dtype or data.dtype)
        return build(data, *args, **kwargs).to(device)

    return built
