"""What a family makes of the things that ComfyUI's nodes put on its model, and what it says about the others.

ComfyUI's networks read the patches that they know and pass over the rest. Here nothing is passed over: what a family
has no place for is refused by name, before the first step where it is on the model, else when the network meets it.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from . import block_patches, layer_pass

# Where a run keeps the sentences that it has logged, in ComfyUI's transformer options.
SAID = "consistent_video_said"

# Functions of ComfyUI that make patches for a node -> the node.
NODES = {"load_hypernetwork_patch": "HypernetworkLoader"}

UNET_PATCHES = (*layer_pass.PATCHES, *block_patches.PATCHES)


@dataclass(frozen=True)
class Served:
    """What a family serves.

    Args:
        title: its name in sentences.
        patches: names under ComfyUI's transformer option "patches".
        replacements: names under "patches_replace".
        pictures: keys of the conditioning with one row per picture, which goes with a clip.
        reads: further keys of the conditioning that it reads.
        controls: whether the features of a ControlNet for Stable Diffusion are added to its blocks.
        windows: axes of the latent (B, C, F, h, w) along which ComfyUI's context windows may cut it.
        patch: side in latent pixels of what the network sees as one; areas are widened to multiples of it.
    """

    title: str
    patches: tuple[str, ...] = UNET_PATCHES
    replacements: tuple[str, ...] = block_patches.REPLACEMENTS
    pictures: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    controls: bool = True
    windows: tuple[int, ...] = (0, 2, 3, 4)
    patch: int = 1

    def check_patches(self, transformer_options: dict) -> None:
        """Raise ValueError, with the node's name, for a patch that no layer of this family calls."""
        for name, functions in transformer_options.get("patches", {}).items():
            if functions and name not in self.patches:
                raise ValueError(self._refusal(name, functions))
        for name, functions in transformer_options.get("patches_replace", {}).items():
            if functions and name not in self.replacements:
                raise ValueError(self._refusal(name, functions.values()))
        if transformer_options.get("rope_options"):
            raise ValueError(f"ScaleROPE: the positions of {self.title} cannot be scaled. Remove that node.")

    def _refusal(self, name: str, functions: Iterable[Callable]) -> str:
        nodes = ", ".join(sorted({node_of(function) for function in functions}))
        return (
            f"{nodes} patches {name!r}, which {self.title} does not have: it would have no effect. Remove that node "
            "from this model."
        )


def node_of(function: object) -> str:
    """The name of the node, function or class that made something which is called during sampling."""
    name = getattr(function, "__qualname__", type(function).__qualname__).split(".")[0]
    return NODES.get(name, name)


def say(transformer_options: dict, sentence: str) -> None:
    """Log a sentence, once in a run."""
    said = transformer_options.get(SAID, set())
    if sentence not in said:
        said.add(sentence)
        logging.warning(sentence)
