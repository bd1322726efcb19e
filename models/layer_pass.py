"""What one pass over the layers of a video UNet shares: embeddings, projected texts, ComfyUI's patches and controls."""

from collections.abc import Iterable, Sequence

import comfy.model_management
import comfy.utils
import torch

PATCHES = (
    "emb_patch",
    "input_block_patch",
    "input_block_patch_after_skip",
    "middle_block_after_patch",
    "output_block_patch",
)


def start_pass(x: torch.Tensor, transformer_options: dict) -> None:
    """Tell patches what ComfyUI's UNet tells them before its first layer; `x` is a clip (B, C, F, h, w)."""
    clips, channels, frames, height, width = x.shape
    transformer_options["original_shape"] = [clips * frames, channels, height, width]
    transformer_options["transformer_index"] = 0
    transformer_options["block"] = ("input", 0)
    transformer_options["block_index"] = 0


def patch_embedding(emb: torch.Tensor, channels: int, transformer_options: dict) -> torch.Tensor:
    """The time embedding (B, D) with ComfyUI's patches of it; `channels` are those of the network's first block."""
    for patch in transformer_options.get("patches", {}).get("emb_patch", ()):
        emb = patch(emb, channels, transformer_options)
    return emb


def skip_channels(widths: Sequence[int], layers: int) -> list[int]:
    """Channels of what a UNet keeps on the way down, block by block.

    Args:
        widths: channels of each level.
        layers: in a level.
    """
    levels = [[width] * (layers if last else layers + 1) for width, last in zip(widths, _is_last(widths))]
    return [widths[0], *(width for level in levels for width in level)]


def attention_places(down: Iterable[list[bool]], up: Iterable[list[bool]]) -> set[tuple[str, int]]:
    """(part, number) of the blocks with attention, numbered as ComfyUI's UNet numbers its own.

    Args:
        down, up: for each level, in the order of execution, whether its layers attend.
    """
    places, number, down = {("middle", 0)}, 0, list(down)
    for level, last in zip(down, _is_last(down)):
        places |= {("input", number + 1 + index) for index, attends in enumerate(level) if attends}
        number += len(level) + (0 if last else 1)
    layers = [attends for level in up for attends in level]
    return places | {("output", index) for index, attends in enumerate(layers) if attends}


def _is_last(items: Sequence) -> list[bool]:
    return [False] * (len(items) - 1) + [True]


class LayerPass:
    """State of one call of a network whose frames are folded into the batch.

    Blocks are numbered and patched as those of ComfyUI's UNet, to whose patches every frame is a picture.

    Args:
        emb: time embedding of every frame (B * F, D).
        keys_values: projected text of every cross-attention, in the order of execution.
        num_frames: F.
        transformer_options: ComfyUI's; see `PATCHES` for what is honoured here.
        context: text states (B, S, D), for patches.
        control: what a ControlNet made of the frames, lists of tensors (B * F, C, h, w) by "input", "middle" and
            "output", taken from their ends.
    """

    def __init__(
        self,
        emb: torch.Tensor,
        keys_values: Iterable[torch.Tensor],
        num_frames: int,
        transformer_options: dict,
        context: torch.Tensor | None = None,
        control: dict | None = None,
    ):
        self.emb = emb
        self.keys_values = iter(keys_values)
        self.num_frames = num_frames
        self.options = transformer_options
        self.context, self.control = context, control or {}
        self.patches = transformer_options.get("patches", {})
        self.inputs = 0
        self.outputs = 0

    def repeat(self, hidden: torch.Tensor) -> torch.Tensor:
        """All frames of the batch, from the frames of its distinct clips."""
        copies = self.emb.shape[0] // hidden.shape[0]
        return hidden if copies == 1 else hidden.repeat(copies, 1, 1, 1)

    def enter_input(self) -> None:
        """Begin the next block on the way down, after the first, which is the convolution of the clip."""
        self.inputs += 1
        self.options["block"] = ("input", self.inputs)

    def leave_input(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes on from a block on the way down, and what is kept for the way up."""
        hidden = skip = self._patch("input_block_patch", self._controlled("input", hidden))
        return self._patch("input_block_patch_after_skip", hidden), skip

    def enter_middle(self) -> None:
        self.options["block"] = ("middle", 0)

    def leave_middle(self, hidden: torch.Tensor, x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        """Args: x, timesteps: the network's inputs."""
        hidden = self._controlled("middle", hidden)
        for patch in self.patches.get("middle_block_after_patch", ()):
            known = {"h": hidden, "x": x, "emb": self.emb, "context": self.context, "y": None, "timesteps": timesteps}
            hidden = patch({**known, "transformer_options": self.options})["h"]
        return hidden

    def enter_output(self, hidden: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """Begin the next block on the way up: all frames, joined with what was kept on the way down."""
        self.options["block"] = ("output", self.outputs)
        self.outputs += 1
        skip = self._controlled("output", skip)
        for patch in self.patches.get("output_block_patch", ()):
            hidden, skip = patch(hidden, skip, self.options)
        hidden = self.repeat(hidden)
        return hidden if skip is None else torch.cat((hidden, self.repeat(skip)), dim=1)

    def attended(self) -> None:
        """Count the transformer that has run."""
        self.options["transformer_index"] += 1

    def _patch(self, name: str, hidden: torch.Tensor) -> torch.Tensor:
        for patch in self.patches.get(name, ()):
            hidden = patch(hidden, self.options)
        return hidden

    def _controlled(self, part: str, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` with the next features of a ControlNet, scaled to it where a patch has changed its size."""
        features = self.control.get(part)
        change = features.pop() if features else None
        if change is None:
            return hidden
        if change.shape[1] != hidden.shape[1]:
            raise ValueError(
                f"A ControlNet gives {change.shape[1]} channels at {part} block {self.options['block'][1]}, where this "
                f"model has {hidden.shape[1]}. Use a ControlNet of the Stable Diffusion that the model is built on."
            )
        if change.shape[2:] != hidden.shape[2:]:
            change = comfy.utils.common_upscale(change, hidden.shape[3], hidden.shape[2], "bilinear", "disabled")
        return hidden + change.to(hidden)


def distinct_clips(x: torch.Tensor, timesteps: torch.Tensor, transformer_options: dict, control=None) -> int:
    """How many of the first clips of a batch (B, C, F, h, w) the rest repeats: B, or B / 2 in a guided run.

    Guidance evaluates the same clips with two texts, which differ only from the first cross-attention on. Looking at
    the values would make a GPU wait, and patches and controls may count on the whole batch, so these get B.
    """
    clips, half = x.shape[0], x.shape[0] // 2
    patched = any(map(transformer_options.get, ("patches", "patches_replace", "optimized_attention_override")))
    if clips % 2 or patched or control or not comfy.model_management.is_device_cpu(x.device):
        return clips
    same = torch.equal(x[:half], x[half:]) and torch.equal(timesteps[:half], timesteps[half:])
    return half if same else clips
