"""Which ComfyUI this is, which one the pack needs, and what of the pack fails in it."""

import re
import sys
import traceback
from pathlib import Path

import comfyui_version

PACK = Path(__file__).resolve().parent.parent
PROJECT = PACK / "pyproject.toml"


def needed_version() -> str | None:
    """Return `requires-comfyui` of pyproject.toml, such as "0.30.0"; None where an installation has no such file."""
    if not PROJECT.is_file():
        return None
    found = re.search(r'^requires-comfyui\s*=\s*">=\s*([\d.]+)"', PROJECT.read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else None


def explain_old_comfyui() -> str | None:
    """Return the sentence that tells users of a ComfyUI that is too old what to do; None if this one is new enough."""
    needed, found = needed_version(), comfyui_version.__version__
    if needed is None or _numbers(found) >= _numbers(needed):
        return None
    return f"ComfyUI-ConsistentVideo needs ComfyUI {needed} or newer, and this is {found}: update ComfyUI."


def _numbers(version: str) -> list[int]:
    """Return the leading numbers of a version: [0, 30, 0] for "0.30.0rc1"."""
    return [int(number) for number in re.match(r"[\d.]*", version).group().split(".") if number]


def has_server() -> bool:
    """Return whether a ComfyUI server runs in this process."""
    return hasattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance")


def explain_failure(error: BaseException) -> str:
    """Return where in the pack an exception comes from, and what it says: "models/base.py, line 3: ImportError: no"."""
    place = ""
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename).resolve()
        if path.is_relative_to(PACK) and not path.relative_to(PACK).parts[0].startswith("."):
            place = f"{path.relative_to(PACK).as_posix()}, line {frame.lineno}: "
    return f"{place}{type(error).__name__}: {error}"


def blame(error: BaseException) -> str:
    """Return `explain_failure` of the first cause, with the version of ComfyUI, and what a user can do."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (
        f"{explain_failure(error)} (ComfyUI {comfyui_version.__version__}). Update the pack; if this stays, report it "
        "with this line."
    )
