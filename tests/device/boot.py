"""ComfyUI and the pack in this process, on the simulated card, in one memory mode."""

import os
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def enter(name: str) -> None:
    """Import ComfyUI as its command line would for a mode of `modes.MODES`; call it before anything imports `comfy`."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(TESTS), str(TESTS.parent / "scripts")]
    import comfy_process

    from . import modes

    mode = modes.MODES[name]
    if name == modes.CPU:
        comfy_process.enter(mode.flags)
        return
    from . import card, tensors

    card.install()
    card.capacity = mode.capacity or card.capacity
    # Before ComfyUI is imported, which looks for a card; tensors of the card come into being inside only.
    tensors.Simulation().__enter__()
    comfy_process.enter(mode.flags, before_pack=lambda: _turn_dynamic_vram_on(mode.resident))


def _turn_dynamic_vram_on(resident: float | None) -> None:
    """What ComfyUI's main.py does before it imports the nodes; None leaves dynamic VRAM off."""
    if resident is None:
        return
    import comfy.memory_management
    import comfy.model_patcher
    import comfy.utils
    import safetensors.torch

    from . import dynamic_vram

    dynamic_vram.install(resident)
    if not dynamic_vram.maps_files():
        comfy.utils.load_safetensors = lambda path: (safetensors.torch.load_file(path), {})
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True
