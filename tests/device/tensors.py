"""Tensors on the simulated card, and how PyTorch's operations act on them."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import memory, rules, waits

CARD = torch.device("cuda", 0)
HOST = torch.device("cpu")
# Types that the card does not have: an NVIDIA card computes in float64, the devices of Apple and Intel do not.
REFUSED_TYPES = (torch.float64, torch.complex128)


class DeviceTensor(torch.Tensor):
    """A tensor that says it is on the card; `held` is the tensor of the CPU with its numbers."""

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "DeviceTensor":
        if held.dtype in REFUSED_TYPES:
            raise TypeError(f"Cannot make a tensor of {held.dtype}: this device does not have the type.")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=CARD,
            requires_grad=False,
        )
        made.held = held
        made.lease = memory.Lease(held)
        return made

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return dispatch(operation, args, kwargs or {})

    def __repr__(self) -> str:
        return f"DeviceTensor({self.held!r})"

    def __deepcopy__(self, memo: dict) -> "DeviceTensor":
        return DeviceTensor(self.held.clone())

    def tolist(self) -> list:
        waits.note("tolist")
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def new_tensor(self, values, dtype=None, device=None, **kwargs) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype or self.dtype, device=self.device if device is None else device)

    def is_pinned(self, device=None) -> bool:
        return False

    def record_stream(self, stream) -> None:
        pass

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self):
        return self.held.untyped_storage()


def move_data(parameter: torch.Tensor, data: torch.Tensor) -> None:
    """`parameter.data = data`, also from one device to the other: the object stays and becomes what `data` is."""
    if isinstance(parameter, DeviceTensor) or isinstance(data, DeviceTensor):
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(data, requires_grad=False))
    else:
        torch._C.TensorBase.data.__set__(parameter, data)


DATA = property(torch._C.TensorBase.data.__get__, move_data)
DeviceTensor.data = torch.nn.Parameter.data = DATA


class Simulation(TorchDispatchMode):
    """While it is entered, whatever is made for or moved to `cuda` becomes a `DeviceTensor`."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return dispatch(operation, args, kwargs or {})

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)


def is_card(device: Any) -> bool:
    """Whether a device, as PyTorch's functions take it, is the card."""
    return isinstance(device, int) or (device is not None and torch.device(device).type == "cuda")


def on_host(value: Any) -> Any:
    """A tensor's numbers on the CPU; anything else as it is."""
    return value.held if isinstance(value, DeviceTensor) else value


def dispatch(operation, args: tuple, kwargs: dict) -> Any:
    """Run one of PyTorch's operations: on the card if one of its tensors is there or its device is the card."""
    name, names = _signature(operation)
    if name in SPECIAL:
        return SPECIAL[name](operation, args, kwargs)
    tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
    card_tensors = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
    device, args, kwargs = _without_card(names, args, kwargs)
    if not card_tensors and not is_card(device):
        _check_filled(tensors)
        return operation(*args, **kwargs)
    if card_tensors:
        _check(name, tensors, args)
    result = operation(*_mapped(args, on_host), **{key: _mapped(value, on_host) for key, value in kwargs.items()})
    if device is not None and not is_card(device):
        return result
    # What an operation returns in place of a new tensor stays the object it was.
    known = {id(tensor.held): tensor for tensor in card_tensors}
    return _mapped(result, lambda value: _to_card(value, known))


@functools.cache
def _signature(operation) -> tuple[str, list[str]]:
    """The name of an operation and those of its arguments."""
    return operation._schema.name, [argument.name for argument in operation._schema.arguments]


def _mapped(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """A value, or lists and tuples of values, with every tensor changed; PyTorch's own function for it is slower."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(item, change) for item in value)
    return [_mapped(item, change) for item in value] if isinstance(value, list) else value


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    """The tensors among values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _to_card(value: torch.Tensor, known: dict[int, DeviceTensor]) -> torch.Tensor:
    if isinstance(value, DeviceTensor):
        return value
    return known[id(value)] if id(value) in known else DeviceTensor(value)


def _check(name: str, tensors: list[torch.Tensor], args: tuple) -> None:
    if name in rules.RESHAPING_IN_PLACE:
        raise NotImplementedError(f"The simulated card cannot do {name}.")
    if name in rules.HOST_READS or (name == "aten::where" and len(tensors) == 1):
        waits.note(name.removeprefix("aten::"))
    host_tensors = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
    if name in rules.INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(not isinstance(index, DeviceTensor) for index in indices):
            waits.note("indices from the host")
        if rules.reads_positions(name, indices, args[2] if len(args) > 2 else None):
            waits.note("positions of a mask")
        host_tensors = [tensor for tensor in host_tensors if all(tensor is not index for index in indices)]
    if name == "aten::repeat_interleave" and any(isinstance(value, torch.Tensor) for value in args[1:2]):
        waits.note("repeat_interleave")
    rules.check_devices(name, host_tensors)
    rules.check_types(name, tensors)


def _check_filled(tensors: list[torch.Tensor]) -> None:
    if any(waits.is_filling(tensor.untyped_storage()._cdata) for tensor in tensors if tensor.device == HOST):
        raise RuntimeError("Host memory was read before the copy from the card that fills it was waited for.")


def _without_card(names: list[str], args: tuple, kwargs: dict) -> tuple[Any, tuple, dict]:
    """The device that a call with arguments of these names asks for, and the call with the CPU in place of the card."""
    if "device" not in names:
        return None, args, kwargs
    place = names.index("device")
    device = args[place] if place < len(args) else kwargs.get("device")
    if is_card(device):
        args = (*args[:place], HOST, *args[place + 1 :]) if place < len(args) else args
        kwargs = {**kwargs, "device": HOST} if "device" in kwargs else kwargs
    return device, args, kwargs


def _arguments(operation, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Arguments by name."""
    return dict(zip(_signature(operation)[1], args, strict=False)) | kwargs


def _convert(operation, args: tuple, kwargs: dict) -> torch.Tensor:
    """`Tensor.to` in all its forms."""
    given = _arguments(operation, args, kwargs)
    source, other = given["self"], given.get("other")
    like = source if other is None else other
    device = given.get("device") if other is None else other.device
    dtype = given.get("dtype") or like.dtype
    to_card = isinstance(source, DeviceTensor) if device is None else is_card(device)
    held = on_host(source)
    crosses = to_card != isinstance(source, DeviceTensor)
    if device is not None and torch.device(device).type == "meta":
        return held.to(device="meta", dtype=dtype)
    copies = crosses or bool(given.get("copy")) or operation._schema.name == "aten::_to_copy"
    if not isinstance(source, DeviceTensor):
        _check_filled([source])
    layout = given.get("memory_format") or torch.preserve_format
    result = held.to(dtype=dtype, copy=copies, memory_format=layout)
    if crosses:
        _transfer(result, to_card, bool(given.get("non_blocking")), pinned=True)
    if not to_card:
        return result
    return source if result is held else DeviceTensor(result)


def _copy(operation, args: tuple, kwargs: dict) -> torch.Tensor:
    """`Tensor.copy_`."""
    given = _arguments(operation, args, kwargs)
    target, source = given["self"], given["src"]
    if not isinstance(source, DeviceTensor):
        _check_filled([source])
    on_host(target).copy_(on_host(source))
    to_card = isinstance(target, DeviceTensor)
    if to_card != isinstance(source, DeviceTensor):
        _transfer(target, to_card, bool(given.get("non_blocking")), pinned=memory.is_pinned(target))
    return target


def _transfer(result: torch.Tensor, to_card: bool, non_blocking: bool, pinned: bool) -> None:
    """Note what a copy between host and card makes the host wait for.

    Args:
        pinned: whether the result, on the host, is pinned: only then a copy from the card is not waited for.
    """
    if not non_blocking or not (to_card or pinned):
        waits.note("copy to the card" if to_card else "copy to the host")
    elif not to_card:
        waits.fills(result.untyped_storage()._cdata)


def _pin(operation, args: tuple, kwargs: dict) -> torch.Tensor:
    if isinstance(args[0], DeviceTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    copy = args[0].clone()
    memory.pin(copy)
    return copy


def _assignable(operation, args: tuple, kwargs: dict) -> bool:
    """Whether `parameter.data = tensor` can be done in place: not from or to the card."""
    return not any(isinstance(tensor, DeviceTensor) for tensor in args)


SPECIAL: dict[str, Callable] = {
    "aten::to": _convert,
    "aten::_to_copy": _convert,
    "aten::type_as": _convert,
    "aten::copy_": _copy,
    "aten::pin_memory": _pin,
    "aten::_pin_memory": _pin,
    "aten::is_pinned": lambda operation, args, kwargs: memory.is_pinned(args[0]),
    "aten::record_stream": lambda operation, args, kwargs: None,
    "aten::_has_compatible_shallow_copy_type": _assignable,
    "prim::device": lambda operation, args, kwargs: CARD if isinstance(args[0], DeviceTensor) else HOST,
}
