"""What one pass over the layers of a video UNet shares: embeddings, projected texts, ComfyUI's block patches."""

from collections.abc import Iterable

import comfy.model_management
import torch


class LayerPass:
    """State of one call of a network whose frames are folded into the batch.

    Args:
        emb: time embedding of every frame (B * F, D).
        keys_values: projected text of every cross-attention, in the order of execution.
        num_frames: F.
        transformer_options: ComfyUI's; `input_block_patch` and `output_block_patch` are honoured.
    """

    def __init__(
        self, emb: torch.Tensor, keys_values: Iterable[torch.Tensor], num_frames: int, transformer_options: dict
    ):
        self.emb = emb
        self.keys_values = iter(keys_values)
        self.num_frames = num_frames
        self.options = transformer_options
        self.patches = transformer_options.get("patches", {})
        self.inputs = 0
        self.outputs = 0

    def repeat(self, hidden: torch.Tensor) -> torch.Tensor:
        """All frames of the batch, from the frames of its distinct clips."""
        copies = self.emb.shape[0] // hidden.shape[0]
        return hidden if copies == 1 else hidden.repeat(copies, 1, 1, 1)

    def patch_input(self, hidden: torch.Tensor) -> torch.Tensor:
        self.options["block"] = ("input", self.inputs)
        self.inputs += 1
        for patch in self.patches.get("input_block_patch", ()):
            hidden = patch(hidden, self.options)
        return hidden

    def patch_output(self, hidden: torch.Tensor, skip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.options["block"] = ("output", self.outputs)
        self.outputs += 1
        for patch in self.patches.get("output_block_patch", ()):
            hidden, skip = patch(hidden, skip, self.options)
        return hidden, skip


def distinct_clips(x: torch.Tensor, timesteps: torch.Tensor, transformer_options: dict) -> int:
    """How many of the first clips of a batch (B, C, F, h, w) the rest repeats: B, or B / 2 in a guided run.

    Guidance evaluates the same clips with two texts, which differ only from the first cross-attention on. Looking at
    the values would make a GPU wait, and patches may count on the whole batch, so both get B.
    """
    clips, half = x.shape[0], x.shape[0] // 2
    patched = any(map(transformer_options.get, ("patches", "patches_replace", "optimized_attention_override")))
    if clips % 2 or patched or not comfy.model_management.is_device_cpu(x.device):
        return clips
    same = torch.equal(x[:half], x[half:]) and torch.equal(timesteps[:half], timesteps[half:])
    return half if same else clips
