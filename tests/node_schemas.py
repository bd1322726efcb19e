"""The node schemas as plain data: the English locale, and the snapshot that protects saved workflows.

As a command: `python tests/node_schemas.py` writes both files. `python3 scripts/update_schemas.py` prepares the
environment first.
"""

import asyncio
import json
from pathlib import Path

from comfy_process import REPOSITORY, enter

enter()

import consistent_video
from consistent_video.nodes.extension import register_folders

ENGLISH = REPOSITORY / "locales" / "en" / "nodeDefs.json"
SNAPSHOT = REPOSITORY / "tests" / "data" / "schema.json"

# Combos that list what is on the disk.
FILE_COMBOS = ("checkpoint", "file", "font", "source")
LIMITS = ("default", "min", "max", "step", "options")


def nodes() -> list[type]:
    """The classes that the extension gives to ComfyUI, in its order."""
    register_folders()
    extension = asyncio.run(consistent_video.comfy_entrypoint())
    return asyncio.run(extension.get_node_list())


def english() -> dict:
    """What the schemas say, in the format of `locales/<language>/nodeDefs.json`."""
    return {schema.node_id: _english_node(schema) for schema in _schemas()}


def snapshot() -> dict:
    """What saved workflows and API clients depend on. Inputs are a list: the editor saves widget values by position."""
    return {schema.node_id: _snapshot_node(schema) for schema in _schemas()}


def output_name(output) -> str:
    """The name that the server gives to an output."""
    return output.display_name or output.get_io_type()


def write(path: Path, content: dict) -> None:
    """Write JSON as the locale files and the snapshot are stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _schemas() -> list:
    return [node.GET_SCHEMA() for node in nodes()]


def _english_node(schema) -> dict:
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {
            entry.id: {"name": entry.display_name or entry.id, "tooltip": entry.tooltip} for entry in schema.inputs
        },
        "outputs": {
            str(index): {"name": output_name(entry), "tooltip": entry.tooltip}
            for index, entry in enumerate(schema.outputs)
        },
    }


def _snapshot_node(schema) -> dict:
    return {
        "display_name": schema.display_name,
        "category": schema.category,
        "output_node": schema.is_output_node,
        "inputs": [_snapshot_input(entry) for entry in schema.inputs],
        "outputs": [{"name": output_name(entry), "type": entry.get_io_type()} for entry in schema.outputs],
    }


def _snapshot_input(entry) -> dict:
    limits = {name: getattr(entry, name, None) for name in LIMITS}
    if entry.id in FILE_COMBOS:
        limits["options"] = None
    limits = {name: value for name, value in limits.items() if value is not None}
    return {"id": entry.id, "type": entry.get_io_type(), "optional": bool(entry.optional), **limits}


if __name__ == "__main__":
    write(ENGLISH, english())
    write(SNAPSHOT, snapshot())
    print(f"Wrote {ENGLISH.relative_to(REPOSITORY)} and {SNAPSHOT.relative_to(REPOSITORY)}.")
