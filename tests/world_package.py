"""Makes the folder `world` importable, without the rest of the repository, whose `nodes` would hide ComfyUI's."""

import sys
from types import ModuleType

from comfy_process import REPOSITORY


def enter() -> None:
    """Register the package `world`."""
    if "world" not in sys.modules:
        package = ModuleType("world")
        package.__path__ = [str(REPOSITORY / "world")]
        sys.modules["world"] = package
