"""A graphics card that is simulated, and what the pack does on it in every memory mode of ComfyUI.

No card is needed: tensors say `cuda:0` while their numbers are computed on the CPU. What CUDA refuses is refused
(tensors on two devices, or of two types; host memory read before a copy from the card has filled it), every wait of
the host for the card is noted with its place, and ComfyUI takes the paths that it takes on a card: classic loading,
low VRAM with one or two streams, no VRAM, high VRAM, only the GPU, dynamic VRAM. Not simulated: kernels and their
rounding, the timing of streams, workspaces, fragmentation.

ComfyUI reads its memory mode once, when it is imported. So every mode has a process of its own (`run.py`), which runs
scenes (`scenes_*.py`) on the tiny checkpoints and saves what they returned; the tests compare it with what the same
scenes return on a CPU. By hand, in the root of the checkout:

    .venv/bin/python tests/device/run.py lowvram_1 modelscope     # a mode of modes.py, scenes (default: all)
    .venv/bin/python tests/device/run.py classic --waits          # prints where the host waits in one sampling step

Modules: tensors (the tensors), rules (what CUDA refuses), waits (what the host waits for), card (torch.cuda), memory
(what lies on the card), dynamic_vram (comfy-aimdo), modes and boot (ComfyUI on the card), run (the process), scenes_*.
"""
