"""ComfyUI's patches of the attentions in a transformer block, called as its own UNet calls them.

Patches know pictures: rows (N, L, C) of N pictures with L tokens each. Here every frame is one picture, N = B * F, and
the prompt of a clip is repeated for its frames. Layers that mix frames are not handed to patches.
"""

from collections.abc import Callable

import torch

PATCHES = ("attn1_patch", "attn1_output_patch", "middle_patch", "attn2_patch", "attn2_output_patch")
REPLACEMENTS = ("attn1", "attn2")


def patched(transformer_options: dict | None) -> bool:
    """Whether a patch or a replacement of attentions is in the options."""
    options = transformer_options or {}
    patches, replaced = options.get("patches"), options.get("patches_replace")
    return bool(patches and any(map(patches.get, PATCHES))) or bool(replaced and any(map(replaced.get, REPLACEMENTS)))


def run_patched(
    block: torch.nn.Module,
    tokens: torch.Tensor,
    seen: Callable[[torch.Tensor], torch.Tensor],
    context: torch.Tensor | None,
    text: tuple[torch.Tensor, torch.Tensor],
    transformer_options: dict,
) -> torch.Tensor:
    """Run a transformer block with the patches of its attentions.

    Args:
        block: has norm1, attn1, norm2, attn2, norm3 and ff.
        tokens: (B * F, L, C), L tokens of every frame.
        seen: gives the tokens (B * F, S, C) that the self-attention of normalised tokens looks at, each frame's own
            ones at every (S / L)th place from the first on.
        context: text states (B, S, D) of every clip, or (B * F, S, D) of every frame; read by `attn2_patch` alone.
        text: keys and values of the text, (B, S, C) or (B * F, S, C).
        transformer_options: ComfyUI's.
    """
    patches = BlockPatches(transformer_options, block.attn1)
    normed = block.norm1(tokens)
    tokens = patches.attend("attn1", block.attn1, normed, seen(normed)) + tokens
    tokens = patches.apply("middle_patch", tokens)
    frames = tokens.shape[0]
    context = None if context is None else _of_frames(context, frames)
    text = tuple(_of_frames(part, frames) for part in text)
    tokens = patches.attend("attn2", block.attn2, block.norm2(tokens), context, text) + tokens
    return tokens + block.ff(block.norm3(tokens))


class BlockPatches:
    """The patches in the options, and what they are told about a block with the attention `attention`."""

    def __init__(self, transformer_options: dict, attention: torch.nn.Module):
        self.options = transformer_options
        self.patches = transformer_options.get("patches", {})
        self.replacements = transformer_options.get("patches_replace", {})
        self.told = {key: value for key, value in transformer_options.items() if not key.startswith("patches")}
        self.told["n_heads"] = attention.heads
        self.told["dim_head"] = attention.inner_dim // attention.heads
        self.told["attn_precision"] = attention.precision

    def apply(self, name: str, tokens: torch.Tensor) -> torch.Tensor:
        for patch in self.patches.get(name, ()):
            tokens = patch(tokens, self.told)
        return tokens

    def attend(
        self,
        name: str,
        attention: torch.nn.Module,
        tokens: torch.Tensor,
        context: torch.Tensor | None,
        projected: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention `name` of tokens (N, L, C) to context (N, S, D), whose keys and values may be projected already."""
        keys = values = context
        for patch in self.patches.get(f"{name}_patch", ()):
            tokens, keys, values = patch(tokens, keys, values, self.told)
        queries = attention.to_q(tokens)
        if projected is None or keys is not context or values is not context:
            keys, values = attention.to_k(keys), attention.to_v(values)
        else:
            keys, values = projected
        replacement = self.replacement(name)
        if replacement is None:
            attended = attention.attend(queries, keys, values, self.options)
        else:
            attended = _own(replacement(queries, keys, values, self.told), queries, keys)
            attended = attention.to_out[0](attended)
        return self.apply(f"{name}_output_patch", attended)

    def replacement(self, name: str, *names_of_block: tuple) -> Callable | None:
        """What takes the place of attention `name` in this block.

        Args:
            names_of_block: more than (part, number, index of the block in its transformer) and (part, number).
        """
        found, block = self.replacements.get(name), self.options.get("block")
        if not found or block is None:
            return None
        keys = ((*block, self.options.get("block_index", 0)), block, *names_of_block)
        return next((found[key] for key in keys if key in found), None)


def _of_frames(rows: torch.Tensor, frames: int) -> torch.Tensor:
    """(B, S, D) of clips or of frames -> (B * F, S, D)."""
    copies = frames // rows.shape[0]
    return rows if copies == 1 else rows.repeat_interleave(copies, dim=0)


def _own(attended: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """As many tokens as there are queries: a replacement that returns the values gives one for every key."""
    if attended.shape[1] == queries.shape[1] or attended.shape[1] != keys.shape[1]:
        return attended
    return attended[:, :: keys.shape[1] // queries.shape[1]]
