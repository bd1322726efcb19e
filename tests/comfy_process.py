"""Puts a real ComfyUI and this pack into the current process.

ComfyUI reads its command line on import, so this runs before anything else imports `comfy`.
"""

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = "consistent_video"
ON_CPU = {"cpu": True, "fp32_text_enc": True}


def comfyui_folder() -> Path:
    """The ComfyUI tree: COMFYUI_PATH, else the newest one that scripts/environment.py prepared."""
    if os.environ.get("COMFYUI_PATH"):
        return Path(os.environ["COMFYUI_PATH"])
    prepared = sorted(path for path in (REPOSITORY / ".comfyui").glob("[0-9]*") if (path / "main.py").is_file())
    if not prepared:
        raise SystemExit("No ComfyUI found: run python3 scripts/environment.py, or set COMFYUI_PATH.")
    return prepared[-1]


def enter(flags: Mapping[str, Any] = ON_CPU, before_pack: Callable[[], None] | None = None) -> None:
    """Make `comfy` importable and the repository the package `consistent_video`.

    Args:
        flags: of ComfyUI's command line; by default it computes on the CPU, text encoders in fp32.
        before_pack: called when ComfyUI is imported and the pack is not.
    """
    if PACKAGE in sys.modules:
        return
    # Spinning OpenMP threads stall each other when several processes share few cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.path[:] = [entry for entry in sys.path if Path(entry or os.getcwd()).resolve() != REPOSITORY]
    sys.path.insert(0, str(comfyui_folder()))
    import comfy.cli_args

    for name, value in {"use_pytorch_cross_attention": True, **flags}.items():
        setattr(comfy.cli_args.args, name, value)
    if before_pack is not None:
        before_pack()
    spec = importlib.util.spec_from_file_location(
        PACKAGE, REPOSITORY / "__init__.py", submodule_search_locations=[str(REPOSITORY)]
    )
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
