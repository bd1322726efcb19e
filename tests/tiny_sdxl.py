"""A small Stable Diffusion XL checkpoint that ComfyUI's own loader recognises by its keys and shapes.

ComfyUI knows the family by the width and depth of its blocks, so those are the smallest known ones (Segmind Vega's), at
one width. The text encoders have their published size, but only the embeddings of common words are no zeros, which a
sparse file stores in no space; the autoencoder paints the latent's values as light colours.
"""

import json
import math
import struct
from pathlib import Path

import comfy.ops
import comfy.sd1_clip
import comfy.sdxl_clip
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from whole_layers import weights_from_the_start

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "channel_mult": [1, 1, 1],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": -1,
    "num_head_channels": 64,
    "num_heads": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "use_checkpoint": False,
    "legacy": False,
    "dtype": torch.float16,
}
AUTOENCODER = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
# Tokens are numbered by how common they are.
COMMON_WORDS = 4000
PAINT_LAYERS = {f"first_stage_model.decoder.{name}.weight" for name in ("conv_in", "conv_out")}
COPY_LAYERS = {"first_stage_model.post_quant_conv.weight"}


@weights_from_the_start()
def shapes() -> dict[str, torch.Size]:
    """Key -> shape of every tensor of the checkpoint."""
    with torch.device("meta"):
        unet = UNetModel(**UNET, device="meta", operations=comfy.ops.disable_weight_init).state_dict()
        vae = AutoencoderKL(embed_dim=4, ddconfig=AUTOENCODER).state_dict()
        clip_l = comfy.sd1_clip.SDClipModel(device="meta", dtype=torch.float16).transformer.state_dict()
        clip_g = comfy.sdxl_clip.SDXLClipG(device="meta", dtype=torch.float16).transformer.state_dict()
    parts = {
        "model.diffusion_model.": unet,
        "first_stage_model.": vae,
        "conditioner.embedders.0.transformer.": clip_l,
        "conditioner.embedders.1.model.transformer.": clip_g,
    }
    return {prefix + key: value.shape for prefix, state in parts.items() for key, value in state.items()}


def write_sdxl(path: Path, seed: int = 0) -> Path:
    """Write the checkpoint as fp16 safetensors; only the network's values take room on disk."""
    header, end = {}, 0
    for key, shape in shapes().items():
        size = 2 * shape.numel()
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(seed)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        file.truncate(start + end)
        for key, entry in header.items():
            values = _values(key, entry["shape"], generator)
            if values is not None:
                file.seek(start + entry["data_offsets"][0])
                file.write(values.half().numpy().tobytes())
    return path


def _values(key: str, shape: list[int], generator: torch.Generator) -> torch.Tensor | None:
    """A tensor's values, or its first rows; None for zeros."""
    if key.startswith("model.diffusion_model."):
        if len(shape) > 1:
            return torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
        return 0.1 * torch.randn(shape, generator=generator) + (1.0 if key.endswith("weight") else 0.0)
    if key.endswith("embeddings.token_embedding.weight"):
        return torch.randn(COMMON_WORDS, shape[1], generator=generator)
    if key in PAINT_LAYERS or key.endswith("nin_shortcut.weight"):
        return torch.randn(shape, generator=generator) * (shape[1] * shape[2] * shape[3]) ** -0.5
    if key in COPY_LAYERS or key.endswith("upsample.conv.weight"):
        centre = torch.zeros(shape)
        centre[:, :, shape[2] // 2, shape[3] // 2] = torch.eye(shape[0])
        return centre
    if key == "first_stage_model.decoder.conv_out.bias":
        return torch.full(shape, 0.5)
    return torch.ones(shape) if key == "first_stage_model.decoder.norm_out.weight" else None
