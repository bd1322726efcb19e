"""Nodes that keep the characters of a story on disk."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..loaders import character_bank as bank_files
from .sockets import checked
from .types import CHARACTER_BANK

CATEGORY = "ConsistentVideo/story"


@checked
class SaveCharacterBank(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoSaveCharacterBank",
            display_name="Save Character Bank",
            category=CATEGORY,
            description="Writes what was kept of a story's characters, so that panels can be drawn later.",
            search_aliases=["storydiffusion", "save characters", "continue story"],
            inputs=[
                CHARACTER_BANK.Input("bank", tooltip="Of Story Sampler."),
                io.String.Input(
                    "filename_prefix",
                    default=f"{bank_files.FOLDER}/bank",
                    tooltip="Below the output folder. Load Character Bank lists its folder character_banks.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, bank, filename_prefix: str) -> io.NodeOutput:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_.safetensors"
        bank_files.save_bank(bank, Path(folder) / file)
        return io.NodeOutput(ui={"banks": [{"filename": file, "subfolder": subfolder, "type": "output"}]})


@checked
class LoadCharacterBank(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoLoadCharacterBank",
            display_name="Load Character Bank",
            category=CATEGORY,
            description="Reads characters that Save Character Bank wrote.",
            search_aliases=["storydiffusion", "load characters", "continue story", "redo panel"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=bank_files.FILES.names(),
                    tooltip="A bank below output/character_banks or models/character_banks.",
                )
            ],
            outputs=[CHARACTER_BANK.Output(tooltip="For Story Sampler or Consistent Self-Attention.")],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return bank_files.FILES.check(file)

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return bank_files.FILES.fingerprint(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(bank_files.load_bank(bank_files.FILES.find(file)))


NODES = [SaveCharacterBank, LoadCharacterBank]
