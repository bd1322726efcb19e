"""The vision tower of EVA02-CLIP-L/14 at 336 pixels (Sun et al. 2023, arXiv 2303.15389), through timm's `Eva`.

Weights: EVA02_CLIP_L_336_psz14_s6B.pt of QuanSun/EVA-CLIP, whose keys are those of its own code (`visual.blocks...`).
"""

import math
import re

import comfy.model_management
import comfy.ops
import torch

from ..models.adopt import adopt
from .extras import import_extra
from .torch_network import assign_weights, load_fully, managed, on_meta

# ConsisID reads the states that enter blocks 4, 8, 12, 16 and 20: what these blocks return.
HIDDEN_BLOCKS = (3, 7, 11, 15, 19)
HEAD_WIDTH = 64
# The grid of the pre-training that rotary positions are scaled to: 224 / 14.
TRAINED_GRID = 16
# OpenAI CLIP's statistics.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PREFIXES = ("visual.trunk.", "visual.")
# Name in EVA-CLIP's code -> name in timm.
RENAMED = (
    (re.compile(r"\.attn\.inner_attn_ln\."), ".attn.norm."),
    (re.compile(r"\.attn\.([qv])_bias$"), r".attn.\1_proj.bias"),
    (re.compile(r"\.mlp\.ffn_ln\."), ".mlp.norm."),
    (re.compile(r"\.mlp\.w1\."), ".mlp.fc1_g."),
    (re.compile(r"\.mlp\.w2\."), ".mlp.fc1_x."),
    (re.compile(r"\.mlp\.w3\."), ".mlp.fc2."),
)


class EvaVision:
    """The tower: pictures -> pooled embedding and five hidden states.

    Args:
        state: tensors of an EVA-CLIP file, with or without its text tower.
        source: what to call the file in an error.

    Raises:
        ImportError: timm is not installed.
        ValueError: weights of another network.
    """

    def __init__(self, state: dict[str, torch.Tensor], source: str):
        self.name = source
        state = vision_state(state, source)
        network = assign_weights(_build(state, source), state, source)
        layers = import_extra("timm.layers", "timm", "The EVA02-CLIP vision tower")
        operations = comfy.ops.manual_cast
        self.side = network.patch_embed.img_size[0]
        self.patcher = managed(adopt(network, operations, {layers.LayerNorm: operations.LayerNorm}))

    def encode(self, pictures: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Read square pictures.

        Args:
            pictures: (B, 3, H, W), 0..1; scaled to the tower's side with a smoothed bicubic filter.

        Returns:
            The projected class token (B, 768), not normalised, and the five hidden states (B, 577, 1024) with the class
            token first, in float32 on ComfyUI's intermediate device.
        """
        device = load_fully(self.patcher)
        scaled = torch.nn.functional.interpolate(
            pictures.float(), (self.side, self.side), mode="bicubic", align_corners=False, antialias=True
        )
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        pooled, states = hidden_states(self.patcher.model, ((scaled.cpu() - mean) / std).to(device))
        results = comfy.model_management.intermediate_device()
        return pooled.to(results), [state.to(results) for state in states]


def hidden_states(network: torch.nn.Module, pixels: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pooled output (B, D) and the states of `HIDDEN_BLOCKS` (B, 1 + N, C) for normalised pixels (B, 3, H, W)."""
    final, states = network.forward_intermediates(
        pixels, indices=list(HIDDEN_BLOCKS), return_prefix_tokens=True, output_fmt="NLC"
    )
    return network.forward_head(final), [torch.cat([prefix, patches], dim=1) for patches, prefix in states]


def vision_state(state: dict[str, torch.Tensor], source: str) -> dict[str, torch.Tensor]:
    """The vision tower's tensors under timm's names; tables of rotary positions are left out, timm computes them.

    Raises:
        ValueError: no EVA02 tower in it.
    """
    prefix = next((prefix for prefix in PREFIXES if f"{prefix}pos_embed" in state), "")
    tower = {
        _timm_name(key.removeprefix(prefix)): value
        for key, value in state.items()
        if key.startswith(prefix) and "rope." not in key
    }
    required = ("pos_embed", "patch_embed.proj.weight", "head.weight", "blocks.0.mlp.fc1_g.weight")
    missing = [key for key in required if key not in tower]
    if missing:
        raise ValueError(
            f"{source} holds no EVA02-CLIP vision tower (no {', '.join(missing)}; it begins with "
            f"{', '.join(list(state)[:3])}). Use EVA02_CLIP_L_336_psz14_s6B.pt, published as QuanSun/EVA-CLIP and in "
            "ConsisID's face_encoder folder."
        )
    return tower


def _timm_name(key: str) -> str:
    for pattern, replacement in RENAMED:
        key = pattern.sub(replacement, key)
    return key


def _build(state: dict[str, torch.Tensor], source: str) -> torch.nn.Module:
    """timm's network on the meta device, its sizes read from the weights."""
    eva = import_extra("timm.models.eva", "timm", "The EVA02-CLIP vision tower")
    layers = import_extra("timm.layers", "timm", "The EVA02-CLIP vision tower")
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    grid = math.isqrt(state["pos_embed"].shape[1] - 1)
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    if width % HEAD_WIDTH or depth <= HIDDEN_BLOCKS[-1]:
        raise ValueError(
            f"{source} has {depth} blocks of width {width}; the five hidden states need more than {HIDDEN_BLOCKS[-1]} "
            f"blocks of a width divisible by {HEAD_WIDTH} (published: 24 of 1024). Use EVA02_CLIP_L_336_psz14_s6B.pt."
        )
    network = on_meta(
        lambda: eva.Eva(
            img_size=grid * patch,
            patch_size=patch,
            num_classes=state["head.weight"].shape[0],
            global_pool="token",
            embed_dim=width,
            depth=depth,
            num_heads=width // HEAD_WIDTH,
            qkv_fused=False,
            # Half a unit more, because the hidden width is rounded down.
            mlp_ratio=(state["blocks.0.mlp.fc1_g.weight"].shape[0] + 0.5) / width,
            swiglu_mlp=True,
            scale_mlp=True,
            scale_attn_inner=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(TRAINED_GRID, TRAINED_GRID),
        )
    )
    # Its tables are no weights: on the meta device they would stay empty.
    network.rope = layers.RotaryEmbeddingCat(
        HEAD_WIDTH, in_pixels=False, feat_shape=(grid, grid), ref_feat_shape=(TRAINED_GRID, TRAINED_GRID)
    )
    return network
