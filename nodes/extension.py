"""The node list, and replacements for nodes of packs that no longer work."""

from comfy_api.latest import ComfyAPI, ComfyExtension, io

from ..loaders import lora
from . import conditioning, latents, loaders, noise, sampling

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


class ConsistentVideoExtension(ComfyExtension):
    async def on_load(self) -> None:
        lora.register()
        for replacement in REPLACEMENTS:
            await ComfyAPI().node_replacement.register(replacement)

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [*loaders.NODES, *conditioning.NODES, *latents.NODES, *noise.NODES, *sampling.NODES]


async def comfy_entrypoint() -> ConsistentVideoExtension:
    """ComfyUI's entry point."""
    return ConsistentVideoExtension()
