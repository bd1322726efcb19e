"""The node list, and replacements for nodes of packs that no longer work.

What ComfyUI cannot import or register, because a newer version changed what it relies on, is logged and left out; the
rest of the pack is there.
"""

import contextlib
import logging
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

from comfy_api.latest import ComfyAPI, ComfyExtension, io

from ..loaders.families import FAMILIES
from ..loaders.host import blame, has_server

# Modules with nodes, in the order of the node list.
NODE_MODULES = (
    "loaders",
    "conditioning",
    "latents",
    "noise",
    "sampling",
    "patches",
    "story",
    "banks",
    "comic",
    "photomaker",
    "faces",
    "consisid",
    "transitions",
)
# Loaders with a folder of their own below `models`, which nodes list.
FOLDER_MODULES = ("character_bank", "fonts", "motion_predictor", "single_file")

REPLACEMENTS = [
    io.NodeReplace(
        old_node_id="ModelScopeT2VLoader",
        new_node_id="ConsistentVideoDiffusionModelLoader",
        old_widget_ids=["model_path", "enable_attn", "enable_conv", "temporal_attn_strength", "temporal_conv_strength"],
        input_mapping=[
            {"new_id": "file", "old_id": "model_path"},
            {"new_id": "family", "set_value": "modelscope"},
            {"new_id": "weight_dtype", "set_value": "default"},
            # Its graphs have Empty Latent Image with the frames as the batch.
            {"new_id": "latent_batch", "set_value": "frames"},
        ],
        output_mapping=[{"new_idx": 0, "old_idx": 0}],
    ),
]


@contextlib.contextmanager
def left_out(what: str) -> Iterator[None]:
    """Log an exception as the reason why `what` (plural) is left out, and go on."""
    try:
        yield
    except Exception as error:
        logging.error("ComfyUI-ConsistentVideo: %s are left out. %s", what, blame(error))
        logging.debug("Why %s are left out:", what, exc_info=True)


def register_folders() -> None:
    """Tell ComfyUI of the pack's own folders below `models`."""
    for name in FOLDER_MODULES:
        with left_out(f"files listed by loaders/{name}.py"):
            import_module(f"..loaders.{name}", __package__).register_folder()


async def register_replacements() -> None:
    """Tell ComfyUI what replaces nodes of dead packs, where a server runs that can be told."""
    if not has_server():
        return
    for replacement in REPLACEMENTS:
        with left_out(f"replacements of the node {replacement.old_node_id}"):
            await ComfyAPI().node_replacement.register(replacement)


def check_families() -> None:
    """Import the code of every model family; log which cannot be used."""
    for family in FAMILIES.values():
        with left_out(f"checkpoints of {family.title}"):
            family.import_parts()


def node_classes(module: ModuleType) -> list[type[io.ComfyNode]]:
    """Return the nodes of a module, without those whose schema this ComfyUI does not take."""
    found = []
    for node in module.NODES:
        with left_out(f"nodes of the class {node.__name__}"):
            node.GET_SCHEMA()
            found.append(node)
    return found


class ConsistentVideoExtension(ComfyExtension):
    async def on_load(self) -> None:
        with left_out("LoRA files of diffusers' trainers"):
            import_module("..loaders.lora", __package__).register()
        register_folders()
        check_families()
        await register_replacements()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes = []
        for name in NODE_MODULES:
            with left_out(f"nodes of nodes/{name}.py"):
                nodes += node_classes(import_module(f".{name}", __package__))
        return nodes
