"""The node list, and replacements for nodes of packs that no longer work."""

from comfy_api.latest import ComfyAPI, ComfyExtension, io

from ..loaders import character_bank, fonts, lora, motion_predictor
from . import (
    banks,
    comic,
    conditioning,
    consisid,
    faces,
    latents,
    loaders,
    noise,
    patches,
    photomaker,
    sampling,
    story,
    transitions,
)

REPLACEMENTS = [
    io.NodeReplace(
        old_node_id="ModelScopeT2VLoader",
        new_node_id="ConsistentVideoDiffusionModelLoader",
        old_widget_ids=["model_path", "enable_attn", "enable_conv", "temporal_attn_strength", "temporal_conv_strength"],
        input_mapping=[
            {"new_id": "file", "old_id": "model_path"},
            {"new_id": "family", "set_value": "modelscope"},
            {"new_id": "weight_dtype", "set_value": "default"},
        ],
        output_mapping=[{"new_idx": 0, "old_idx": 0}],
    ),
]


def register_folders() -> None:
    """Tell ComfyUI of the pack's own folders below `models`, which nodes list."""
    character_bank.register_folder()
    fonts.register_folder()
    motion_predictor.register_folder()


class ConsistentVideoExtension(ComfyExtension):
    async def on_load(self) -> None:
        lora.register()
        register_folders()
        for replacement in REPLACEMENTS:
            await ComfyAPI().node_replacement.register(replacement)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            *loaders.NODES,
            *conditioning.NODES,
            *latents.NODES,
            *noise.NODES,
            *sampling.NODES,
            *patches.NODES,
            *story.NODES,
            *banks.NODES,
            *comic.NODES,
            *photomaker.NODES,
            *faces.NODES,
            *consisid.NODES,
            *transitions.NODES,
        ]


async def comfy_entrypoint() -> ConsistentVideoExtension:
    """ComfyUI's entry point."""
    return ConsistentVideoExtension()
