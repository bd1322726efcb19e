"""Starts the trainers: `accelerate launch -m consistent_video_train TRAINER FILE.yaml [key=value ...]`.

Runs from a checkout of the pack, whatever its folder is called, and from an installed wheel. The networks are built of
ComfyUI's parts, so that one is needed: the one around a checkout in custom_nodes, or the one that COMFYUI_PATH names.
"""

import importlib
import importlib.util
import multiprocessing
import os
import sys
from pathlib import Path

PACKAGE = "consistent_video"
HERE = Path(__file__).resolve().parent


def comfyui_folder() -> Path:
    """The ComfyUI whose parts are used.

    Raises:
        SystemExit: there is none.
    """
    named = os.environ.get("COMFYUI_PATH")
    prepared = sorted((HERE / ".comfyui").glob("[0-9]*"))
    candidates = [Path(named)] if named else [HERE.parent.parent, *reversed(prepared)]
    for folder in candidates:
        if (folder / "comfy" / "ldm").is_dir():
            return folder.resolve()
    raise SystemExit(
        f"No ComfyUI in {' or '.join(map(str, candidates))}. Set COMFYUI_PATH to the folder that holds ComfyUI's "
        "main.py."
    )


def enter() -> None:
    """Make ComfyUI importable on the device of this process, and the pack as the package `consistent_video`."""
    is_checkout = (HERE / "nodes" / "extension.py").is_file()
    # The pack's own folders have names that are ComfyUI's, too.
    sys.path[:] = [entry for entry in sys.path if not (is_checkout and Path(entry or os.getcwd()).resolve() == HERE)]
    sys.path.insert(0, str(comfyui_folder()))
    _choose_device()
    if not is_checkout:
        importlib.import_module(PACKAGE)
        return
    spec = importlib.util.spec_from_file_location(PACKAGE, HERE / "__init__.py", submodule_search_locations=[str(HERE)])
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)


def _choose_device() -> None:
    """ComfyUI looks at its command line, and at the current device, once: when it is imported."""
    import comfy.cli_args
    import torch

    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    decodes_videos = multiprocessing.parent_process() is not None
    comfy.cli_args.args.cpu = on_cpu or decodes_videos or not torch.accelerator.is_available()
    # The attentions that ComfyUI prefers elsewhere have no backward pass.
    comfy.cli_args.args.use_pytorch_cross_attention = True
    if not comfy.cli_args.args.cpu and "LOCAL_RANK" in os.environ:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))


# Outside of main: processes that decode videos import this file anew where the system cannot fork.
if PACKAGE not in sys.modules:
    enter()


if __name__ == "__main__":
    importlib.import_module(f"{PACKAGE}.training.command").main()
