"""A small Stable Diffusion XL checkpoint that ComfyUI's own loader recognises by its keys and shapes.

ComfyUI knows the family by the width and depth of its blocks, so those are the smallest known ones (Segmind Vega's), at
one width. The text encoders have their published size but hold zeros, which a sparse file stores in no space; the
autoencoder paints one colour.
"""

import json
import struct
from pathlib import Path

import comfy.ops
import comfy.sd1_clip
import comfy.sdxl_clip
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

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
            if key.startswith("model.diffusion_model.") or key == "first_stage_model.decoder.conv_out.bias":
                scale = 0.02 if len(entry["shape"]) > 1 else 0.3
                file.seek(start + entry["data_offsets"][0])
                values = scale * torch.randn(entry["shape"], generator=generator)
                file.write(values.half().numpy().tobytes())
    return path
