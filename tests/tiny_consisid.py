"""A tiny ConsisID checkpoint in the published layout: same files, keys and configuration fields, random weights."""

import json
import shutil
from pathlib import Path

import tiny_cogvideox
import torch
from diffusers import ConsisIDTransformer3DModel
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

CONSISID_NAME = "ConsisID-preview"
TEXT_WIDTH = 64
TEXT_TOKENS = 226
ID_WIDTH = 40
VISION_WIDTH = 32
VISION_TOKENS = 17
SCALES = 5
# 96 channels: the identity tokens are two thirds as wide.
TRANSFORMER = {
    "num_attention_heads": 6,
    "attention_head_dim": 16,
    "in_channels": 32,
    "out_channels": 16,
    "time_embed_dim": 32,
    "text_embed_dim": TEXT_WIDTH,
    "num_layers": 4,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 49,
    "max_text_seq_length": TEXT_TOKENS,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
    "is_train_face": True,
    "is_kps": False,
    "cross_attn_interval": 2,
    "cross_attn_dim_head": 128,
    "cross_attn_num_heads": 2,
    "LFE_id_dim": ID_WIDTH,
    "LFE_vit_dim": VISION_WIDTH,
    "LFE_depth": 10,
    "LFE_dim_head": 64,
    "LFE_num_heads": 2,
    "LFE_num_id_token": 5,
    "LFE_num_querie": 8,
    "LFE_output_dim": 64,
}
# As published for the 5B models.
SCHEDULER = {
    "_diffusers_version": "0.30.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 1.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}


def transformer(seed: int = 0, **settings) -> ConsisIDTransformer3DModel:
    """The published class, tiny, every parameter off its initial value."""
    torch.manual_seed(seed)
    network = ConsisIDTransformer3DModel(**{**TRANSFORMER, **settings})
    _spread(network)
    if network.config.use_learned_positional_embeddings:
        positions = network.patch_embed.pos_embedding
        positions.add_(0.05 * torch.randn_like(positions))
    return network.eval()


def face(seed: int = 0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """An identity embedding (1, id width) and vision states, one (1, tokens, width) per scale."""
    generator = torch.Generator().manual_seed(seed)
    identity = torch.randn(1, ID_WIDTH, generator=generator)
    return identity, [torch.randn(1, VISION_TOKENS, VISION_WIDTH, generator=generator) for _ in range(SCALES)]


def write_consisid(
    folder: Path, seed: int = 0, scheduler: str = "CogVideoXDPMScheduler", half: bool = False, **settings
) -> Path:
    """A ConsisID folder; `half` stores transformer and text encoder as bf16, the transformer in shards."""
    network = transformer(seed, **settings)
    size = {"max_shard_size": "400KB"} if half else {}
    (network.bfloat16() if half else network).save_pretrained(folder / "transformer", **size)
    write_text_encoder(folder / "text_encoder", half)
    write_tokenizer(folder / "tokenizer")
    tiny_cogvideox.write_vae(folder / "vae")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({"_class_name": scheduler, **SCHEDULER}), encoding="utf-8"
    )
    index = {
        "_class_name": "ConsisIDPipeline",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "ConsisIDTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def text_encoder(seed: int = 3) -> T5EncoderModel:
    """T5 v1.1, tiny but for its vocabulary."""
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=32128,
        d_model=TEXT_WIDTH,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    model = T5EncoderModel(config)
    _spread(model)
    return model.eval()


def write_text_encoder(folder: Path, half: bool = False) -> None:
    """A T5 encoder as published: one set of embeddings, under `shared`."""
    model = text_encoder()
    (model.bfloat16() if half else model).save_pretrained(folder)
    path = folder / "model.safetensors"
    state = {key: value for key, value in load_file(path).items() if key != "encoder.embed_tokens.weight"}
    save_file(state, path, metadata={"format": "pt"})


def comfyui_tokenizer() -> Path:
    """The T5 vocabulary that ComfyUI ships."""
    import comfy.text_encoders

    return Path(next(iter(comfy.text_encoders.__path__))) / "t5_tokenizer"


def write_tokenizer(folder: Path) -> None:
    """A T5 tokenizer folder."""
    shutil.copytree(comfyui_tokenizer(), folder)


def _spread(model: torch.nn.Module) -> None:
    """Move every parameter off its initial value: zero-initialised layers and constant norms would hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
