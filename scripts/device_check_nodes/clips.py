"""What the device check runs of each family: sizes, random weights, and the inputs of a guided run."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    ConsisIDTransformer3DModel,
    I2VGenXLUNet,
    UNet3DConditionModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from safetensors.torch import save_file

PUBLISHED, TINY = "published", "tiny"
IMAGE_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
VIDEO_VAE = {"latent_channels": 16, "scaling_factor": 0.7}
TINY_WIDTHS = {"block_out_channels": (32, 32, 64, 64), "layers_per_block": 1}
TINY_UNET = {"block_out_channels": (64, 64, 128, 128), "layers_per_block": 1, "cross_attention_dim": 64}
TINY_IMAGE_VAE, TINY_VIDEO_VAE = {**IMAGE_VAE, **TINY_WIDTHS}, {**VIDEO_VAE, **TINY_WIDTHS, "norm_num_groups": 8}
CONSISID = {
    "num_attention_heads": 48,
    "in_channels": 32,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
    "use_learned_positional_embeddings": True,
    "is_train_face": True,
}
TINY_CONSISID = {
    **CONSISID,
    **{"num_attention_heads": 6, "attention_head_dim": 16, "num_layers": 4, "time_embed_dim": 32},
    **{"text_embed_dim": 64, "max_text_seq_length": 16, "sample_width": 12, "sample_height": 8},
    **{
        "cross_attn_num_heads": 2,
        "LFE_num_heads": 2,
        "LFE_num_querie": 8,
        "LFE_output_dim": 64,
        "LFE_id_dim": 64,
        "LFE_vit_dim": 32,
        "LFE_depth": 5,
    },
}


@dataclass(frozen=True)
class Clip:
    """A clip of one family at one size.

    Args:
        family: name of the family.
        network, vae: fields of their configurations that differ from their classes' defaults.
        vae_class: diffusers class of the autoencoder.
        frames, width, height: of the clip, in pixels.
        reference: diffusers class of the network, if diffusers has it.
    """

    family: str
    network: dict
    vae: dict
    vae_class: type
    frames: int
    width: int
    height: int
    reference: type | None = None


CLIPS = {
    PUBLISHED: (
        Clip("modelscope", {}, IMAGE_VAE, AutoencoderKL, 16, 256, 256, UNet3DConditionModel),
        Clip("i2vgenxl", {}, IMAGE_VAE, AutoencoderKL, 16, 1280, 704, I2VGenXLUNet),
        Clip("consisti2v", {}, IMAGE_VAE, AutoencoderKL, 16, 256, 256),
        Clip("consisid", CONSISID, VIDEO_VAE, AutoencoderKLCogVideoX, 49, 720, 480, ConsisIDTransformer3DModel),
    ),
    TINY: (
        Clip("modelscope", TINY_UNET, TINY_IMAGE_VAE, AutoencoderKL, 4, 64, 64, UNet3DConditionModel),
        Clip("i2vgenxl", TINY_UNET, TINY_IMAGE_VAE, AutoencoderKL, 4, 64, 64, I2VGenXLUNet),
        Clip(
            "consisti2v",
            {**TINY_UNET, "attention_head_dim": (1, 1, 2, 2), "n_temp_heads": 2},
            TINY_IMAGE_VAE,
            AutoencoderKL,
            4,
            64,
            64,
        ),
        Clip(
            "consisid",
            TINY_CONSISID,
            TINY_VIDEO_VAE,
            AutoencoderKLCogVideoX,
            9,
            96,
            64,
            ConsisIDTransformer3DModel,
        ),
    ),
}


def part(pack: ModuleType, name: str) -> ModuleType:
    """A module of the pack, which ComfyUI imports under a name of its own."""
    return import_module(f".{name}", pack.__name__)


def random_state(network: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """Random weights for a network on the meta device, drawn on `device` and kept in RAM.

    Matrices and kernels keep the size of what passes through them; norms are 1, biases 0.
    """
    state = {}
    for key, tensor in network.state_dict().items():
        if tensor.ndim > 1:
            drawn = torch.randn(tensor.shape, device=device, dtype=dtype) * tensor[0].numel() ** -0.5
        else:
            drawn = torch.zeros(tensor.shape) if key.endswith("bias") else torch.ones(tensor.shape)
        state[key] = drawn.to("cpu", dtype)
    return state


def write_vae(clip: Clip, folder: Path, device: torch.device) -> None:
    """Write a random autoencoder as a checkpoint folder has it, for the real loader."""
    with torch.device("meta"):
        network = clip.vae_class(**clip.vae)
    (folder / "vae").mkdir(parents=True, exist_ok=True)
    state = random_state(network, torch.bfloat16, device)
    save_file(state, folder / "vae" / "diffusion_pytorch_model.safetensors")
    config = {**network.config, "_class_name": clip.vae_class.__name__}
    (folder / "vae" / "config.json").write_text(json.dumps(config), encoding="utf-8")


def prompts(pack: ModuleType, clip: Clip, config: object, vae: object) -> tuple[list, list]:
    """Two prompts of random text states, with the random picture or face that the family needs."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    tokens, width = (
        (config.max_text_seq_length, config.text_embed_dim)
        if clip.family == "consisid"
        else (77, config.cross_attention_dim)
    )
    both = [[draw(1, tokens, width), {}]], [[draw(1, tokens, width), {}]]
    picture = torch.rand(1, clip.height, clip.width, 3, generator=generator)
    if clip.family == "i2vgenxl":
        conditioning = part(pack, "models.i2vgenxl_conditioning")
        embedding = draw(1, 1, width)
        return conditioning.add_pictures(*both, vae, picture, embedding, clip.width, clip.height, 16.0, "sample", 0)
    if clip.family == "consisti2v":
        conditioning = part(pack, "models.consisti2v_conditioning")
        video = conditioning.static_video(vae, picture, None, "none", clip.frames, clip.width, clip.height)
        return conditioning.condition_prompts(*both, video, 3)
    if clip.family == "consisid":
        conditioning = part(pack, "models.consisid_conditioning")
        identity = draw(1, config.LFE_id_dim)
        vision = [draw(1, 577, config.LFE_vit_dim) for _ in range(config.LFE_num_scale)]
        return conditioning.condition_prompts(*both, vae, picture, picture, identity, vision, clip.width, clip.height)
    return both


def reference_call(clip: Clip, network: torch.nn.Module, shape: tuple, device: torch.device) -> Callable:
    """A guided call of diffusers' network, with inputs of its own on the device; `shape` is (C, F, h, w)."""
    dtype, config = next(network.parameters()).dtype, network.config
    draw = lambda *size: torch.randn(size, device=device, dtype=dtype)  # noqa: E731
    channels, frames, height, width = shape
    timesteps = torch.full((2,), 500, device=device)
    if clip.family != "consisid":
        call = [draw(2, *shape), timesteps]
        text = draw(2, 77, config.cross_attention_dim)
        if clip.family == "modelscope":
            return lambda: network(*call, text)
        fps, picture = torch.full((2,), 16, device=device), draw(2, *shape)
        embedding = draw(2, config.cross_attention_dim)
        return lambda: network(*call, fps, picture, embedding, encoder_hidden_states=text)
    grid = (height // config.patch_size, width // config.patch_size)
    tables = get_3d_rotary_pos_embed(config.attention_head_dim, ((0, 0), grid), grid, frames)  # float64 on the way
    rotary = tuple(table.to(device, torch.float32) for table in tables)
    noisy, text = (
        draw(2, frames, 2 * channels, height, width),
        draw(2, config.max_text_seq_length, config.text_embed_dim),
    )
    face = {"id_cond": draw(2, config.LFE_id_dim)}
    face["id_vit_hidden"] = [draw(2, 577, config.LFE_vit_dim) for _ in range(config.LFE_num_scale)]
    return lambda: network(noisy, text, timesteps, image_rotary_emb=rotary, **face)
