"""Runs scenes in one memory mode and saves what they returned.

python tests/device/run.py MODE [SCENE ...] [--models FOLDER] [--result FILE] [--waits]
"""

import argparse
import importlib
import sys
import tempfile
import time
import traceback
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != TESTS / "device"]
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))
SCENE_MODULES = sorted(path.stem for path in Path(__file__).parent.glob("scenes_*.py"))


def main() -> None:
    arguments = parse()
    from device import boot, modes

    boot.enter(arguments.mode)
    import torch

    from device import scenes

    for name in SCENE_MODULES:
        importlib.import_module(f"device.{name}")
    bound_chunks(modes.MODES[arguments.mode].chunk_rows)
    stage = scenes.Stage(models_folder(arguments.models), modes.MODES[arguments.mode])
    with torch.inference_mode():
        errors = run_scenes(stage, arguments.scenes or list(scenes.SCENES))
    if arguments.waits:
        print_waits(stage)
    found = {"values": stage.values, "waits": stage.waits, "errors": errors}
    if arguments.result:
        torch.save({**found, "left": left_on_the_card(stage), "pinned": pinned()}, arguments.result)
    sys.exit(bool(errors))


def bound_chunks(rows: int | None) -> None:
    """Let feed-forwards work on this many rows at a time; tiny networks have too few for the published number."""
    from consistent_video.models import consisid_blocks, transformer

    if rows is not None:
        transformer.DEVICE_ROWS = consisid_blocks.DEVICE_ROWS = rows


def run_scenes(stage, names: list[str]) -> dict[str, str]:
    """Run scenes one after the other and print how long each took; returns name -> traceback."""
    from device import scenes

    errors = {}
    for name in names:
        started = time.perf_counter()
        try:
            scenes.SCENES[name](stage)
        except Exception:  # noqa: BLE001 (what one scene raises is reported beside the others' results)
            errors[name] = traceback.format_exc()
            print(errors[name], flush=True)
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
    return errors


def print_waits(stage) -> None:
    """Print where the host waited in one step of each sampling run."""
    from device import waits

    for name, places in stage.waits.items():
        print(f"{name}: {places.total()} waits in one step\n{waits.report(places)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode")
    parser.add_argument("scenes", nargs="*", metavar="SCENE")
    parser.add_argument("--models", type=Path, help="a models folder with the tiny checkpoints; by default, make one")
    parser.add_argument("--result", type=Path, help="where to save what the scenes returned")
    parser.add_argument("--waits", action="store_true", help="print where the host waits in one sampling step")
    arguments = parser.parse_args()
    sys.argv[1:] = []
    return arguments


def models_folder(given: Path | None) -> Path:
    """The folder with the tiny checkpoints; without one, a folder in the temporary directory that is made once."""
    if given:
        return given
    import tiny_checkpoints

    folder = Path(tempfile.gettempdir()) / "consistent_video_device" / "models"
    if not (folder / "complete").exists():
        tiny_checkpoints.build_all(folder)
        (folder / "complete").touch()
    return folder


def left_on_the_card(stage) -> list[str]:
    """Return what lies on the card after everything has been unloaded."""
    import comfy.model_management

    from device import memory

    stage.forget()
    comfy.model_management.unload_all_models()
    comfy.model_management.reset_cast_buffers()
    return memory.left_behind()


def pinned() -> int:
    """How many layers are still kept on the card, and pieces of host memory registered with it."""
    from device import dynamic_vram, memory

    return len(dynamic_vram.pins) + len(memory.registered)


if __name__ == "__main__":
    main()
