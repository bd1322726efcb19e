"""Puts a real ComfyUI and this pack into the current process.

ComfyUI reads its command line on import, so this runs before anything else imports `comfy`.
"""

import importlib.util
import os
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "consistent_video"


def comfyui_folder() -> Path:
    """The ComfyUI tree: COMFYUI_PATH, else the newest one that scripts/environment.py prepared."""
    if os.environ.get("COMFYUI_PATH"):
        return Path(os.environ["COMFYUI_PATH"])
    prepared = sorted(path for path in (REPOSITORY / ".comfyui").glob("[0-9]*") if (path / "main.py").is_file())
    if not prepared:
        raise SystemExit("No ComfyUI found: run python3 scripts/environment.py, or set COMFYUI_PATH.")
    return prepared[-1]


def enter() -> None:
    """Make `comfy` importable, computing in fp32 on the CPU, and the repository as the package `consistent_video`."""
    if PACKAGE in sys.modules:
        return
    # Spinning OpenMP threads stall each other when several processes share few cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != REPOSITORY]
    sys.path.insert(0, str(comfyui_folder()))
    import comfy.cli_args

    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    comfy.cli_args.args.fp32_text_enc = True
    spec = importlib.util.spec_from_file_location(
        PACKAGE, REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
