"""A node that checks one family on the device of the ComfyUI that it runs in; scripts/device_check.py queues it."""

import json
import sys
from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from . import measure

ROOT = Path(__file__).resolve().parent.parent.parent


def pack():
    """The pack as ComfyUI imported it, under the name of its folder."""
    files = ((module, getattr(module, "__file__", None)) for module in list(sys.modules.values()))
    return next(module for module, file in files if file and Path(file).resolve() == ROOT / "__init__.py")


class DeviceCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [
            io.String.Input("family"),
            io.Boolean.Input("tiny"),
            io.Boolean.Input("streamed"),
            io.Float.Input("seconds", max=1e6),
            io.String.Input("file"),
        ]
        return io.Schema("DeviceCheck", inputs=inputs, outputs=[], is_output_node=True)

    @classmethod
    def execute(cls, family, tiny, streamed, seconds, file):
        """Write the result into a file of the output folder, again after every row."""
        path = Path(folder_paths.get_output_directory()) / Path(file).name
        keep = lambda result: path.write_text(json.dumps(result), encoding="utf-8")  # noqa: E731
        measure.check(pack(), family, tiny, seconds, streamed, keep)
        return io.NodeOutput()


class DeviceCheckNodes(ComfyExtension):
    async def get_node_list(self):
        return [DeviceCheck]


async def comfy_entrypoint():
    return DeviceCheckNodes()
