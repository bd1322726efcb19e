"""Networks of ComfyUI that tests build and fill themselves, in every memory mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.memory_management


@contextmanager
def weights_from_the_start() -> Iterator[None]:
    """Inside, ComfyUI's layers have their weights when they are built, as they have without dynamic VRAM."""
    before, comfy.memory_management.aimdo_enabled = comfy.memory_management.aimdo_enabled, False
    try:
        yield
    finally:
        comfy.memory_management.aimdo_enabled = before
