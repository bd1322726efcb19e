"""What the shapes in a file of ConsisID's weights tell about the network."""

from collections.abc import Mapping

import torch

# Widths of an attention head that no shape tells, as published.
CROSS_HEAD = 128
EXTRACTOR_HEAD = 64


def count(state: Mapping[str, torch.Tensor], pattern: str) -> int:
    """How many consecutive indices 0, 1, ... of a key pattern exist."""
    index = 0
    while pattern.format(index) in state:
        index += 1
    return index


def network_config(state: Mapping[str, torch.Tensor]) -> dict:
    """The configuration of the network whose weights these are; what shapes do not tell is as published.

    Missing keys count as the published size, so that comparing the network with the state dict names them.
    """
    width, channels, side = _shape(state, "patch_embed.proj.weight", (3072, 32, 2, 2))[:3]
    head = _shape(state, "transformer_blocks.0.attn1.norm_q.weight", (64,))[0]
    layers = count(state, "transformer_blocks.{}.norm1.linear.weight")
    return {
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": channels,
        "out_channels": _shape(state, "proj_out.weight", (16 * side**2, width))[0] // side**2,
        "time_embed_dim": _shape(state, "time_embedding.linear_2.weight", (512, 512))[0],
        "text_embed_dim": _shape(state, "patch_embed.text_proj.weight", (width, 4096))[1],
        "num_layers": layers,
        "patch_size": side,
        "attention_bias": "transformer_blocks.0.attn1.to_q.bias" in state,
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": "patch_embed.pos_embedding" in state,
        "is_train_face": True,
        **_face_config(state, layers),
    }


def _face_config(state: Mapping[str, torch.Tensor], layers: int) -> dict:
    attentions = count(state, "perceiver_cross_attention.{}.to_q.weight")
    extractor = "local_facial_extractor."
    _, queries, width = _shape(state, f"{extractor}latents", (1, 32, 1024))
    mapping = f"{extractor}id_embedding_mapping."
    return {
        "cross_attn_interval": max(1, layers // max(1, attentions)),
        "cross_attn_dim_head": CROSS_HEAD,
        "cross_attn_num_heads": _shape(state, "perceiver_cross_attention.0.to_q.weight", (2048, 1))[0] // CROSS_HEAD,
        "LFE_id_dim": _shape(state, f"{mapping}0.weight", (width, 1280))[1],
        "LFE_vit_dim": width,
        "LFE_depth": count(state, extractor + "layers.{}.0.to_q.weight"),
        "LFE_dim_head": EXTRACTOR_HEAD,
        "LFE_num_heads": _shape(state, f"{extractor}layers.0.0.to_q.weight", (1024, 1))[0] // EXTRACTOR_HEAD,
        "LFE_num_id_token": _shape(state, f"{mapping}6.weight", (5 * width, 1))[0] // width,
        "LFE_num_querie": queries,
        "LFE_output_dim": _shape(state, f"{extractor}proj_out", (width, 2048))[1],
        "LFE_ff_mult": _shape(state, f"{extractor}layers.0.1.1.weight", (4 * width, 1))[0] // width,
        "LFE_num_scale": count(state, extractor + "mapping_{}.0.weight"),
    }


def _shape(state: Mapping[str, torch.Tensor], key: str, default: tuple[int, ...]) -> tuple[int, ...]:
    found = tuple(state[key].shape) if key in state else default
    return found if len(found) == len(default) else default
