"""The simulated card itself: what CUDA refuses is refused, and waits are counted."""

import comfy.model_management
import pytest
import torch

from . import memory, waits
from .scenes import Stage, noise_of, scene


@scene
def card(stage: Stage) -> None:
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        return
    values = noise_of(2, 3).to(device)
    before = memory.in_use()
    with pytest.raises(RuntimeError, match="same device"):
        values + noise_of(2, 3)
    with pytest.raises(RuntimeError, match="same type"):
        torch.nn.functional.linear(values, values.half())
    with pytest.raises(TypeError, match="Use Tensor.cpu"):
        values.numpy()
    with pytest.raises(TypeError, match="float64"):
        values.double()
    late = values.to("cpu", non_blocking=True)
    with pytest.raises(RuntimeError, match="before the copy"):
        late + 1
    torch.cuda.synchronize()
    assert torch.equal(late, noise_of(2, 3))
    assert {kind for kind, _ in counted(values)} == {
        "item",
        "copy to the card",
        "copy to the host",
        "positions of a mask",
    }
    with waits.counted() as found:
        values.clone().mul_(2).masked_fill_(values > 0, 1.0)
        values.to(torch.float16), values[0], values[values.argmax(dim=1)]
    assert not found
    more = torch.empty(1000, dtype=torch.uint8, device=device)
    assert memory.in_use() == before + 1000
    del more
    assert memory.in_use() == before


def counted(values: torch.Tensor) -> dict:
    """Waits of four operations of different kinds."""
    with waits.counted() as found:
        values.sum().item()
        noise_of(2).to(values.device)
        values.cpu()
        values[values > 0]
    return found
