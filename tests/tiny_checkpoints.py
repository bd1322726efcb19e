"""Tiny checkpoints in the published layout: same files, keys and configuration fields, few channels, random weights.

As a command: `python tests/tiny_checkpoints.py MODELS_FOLDER` writes every checkpoint that the example workflows name.
"""

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, I2VGenXLUNet, UNet3DConditionModel
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

MODELSCOPE_NAME = "text-to-video-ms-1.7b"
ORIGINAL_NAME = "text2video_pytorch_model.pth"
TEXT_WIDTH = 64
MODELSCOPE_UNET = {
    "sample_size": 32,
    "block_out_channels": (64, 64, 128, 128),
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 64,
    "norm_num_groups": 32,
}
I2VGENXL_NAME = "i2vgen-xl"
CONSISTI2V_NAME = "ConsistI2V"
CONSISTI2V_UNET = {
    "_class_name": "VideoLDMUNet3DConditionModel",
    "block_out_channels": [64, 64, 128, 128],
    "layers_per_block": 1,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": [1, 1, 2, 2],
    "n_temp_heads": 2,
}
CONSISTI2V_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "steps_offset": 1,
}
REFINER_NAME = "zeroscope_v2_XL"
SDXL_NAME = "sd_xl_base_1.0.safetensors"
I2VGENXL_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.24.0.dev0",
    "beta_end": 0.02,
    "beta_schedule": "squaredcos_cap_v2",
    "beta_start": 0.0001,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
MODELSCOPE_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "_diffusers_version": "0.15.0.dev0",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "prediction_type": "epsilon",
    "trained_betas": None,
}


def comfyui_tokenizer() -> Path:
    """The CLIP vocabulary that ComfyUI ships."""
    import comfy

    return Path(next(iter(comfy.__path__))) / "sd1_tokenizer"


def write_tokenizer(folder: Path, pad_token: str) -> None:
    """A CLIP tokenizer folder with the published files and padding token."""
    folder.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(comfyui_tokenizer() / name, folder / name)
    config = json.loads((comfyui_tokenizer() / "tokenizer_config.json").read_text(encoding="utf-8"))
    special = json.loads((comfyui_tokenizer() / "special_tokens_map.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "pad_token": pad_token, "model_max_length": 77}), encoding="utf-8"
    )
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": pad_token}), encoding="utf-8")


def write_text_encoder(folder: Path, layers: int = 3) -> None:
    """A CLIP text tower as published: keys start with `text_model.`."""
    config = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=TEXT_WIDTH,
        intermediate_size=2 * TEXT_WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        hidden_act="gelu",
        eos_token_id=2,
        bos_token_id=0,
        pad_token_id=1,
    )
    model = CLIPTextModel(config)
    _spread(model)
    model.save_pretrained(folder)
    path = folder / "model.safetensors"
    state = {
        key if key.startswith("text_model.") else f"text_model.{key}": value for key, value in load_file(path).items()
    }
    save_file(state, path, metadata={"format": "pt"})


def write_image_vae(folder: Path) -> None:
    """A Stable Diffusion AutoencoderKL."""
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.18215,
    )
    _spread(vae)
    vae.save_pretrained(folder)


def write_modelscope(folder: Path, seed: int = 0, **unet_settings) -> Path:
    """A ModelScope text-to-video folder."""
    _modelscope_unet(seed, **unet_settings).save_pretrained(folder / "unet")
    write_image_vae(folder / "vae")
    write_text_encoder(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer", "!")
    write_scheduler(folder, MODELSCOPE_SCHEDULER)
    index = {
        "_class_name": "TextToVideoSDPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet3DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_image_encoder(folder: Path) -> None:
    """A CLIP vision tower with projection, as published, and the picture statistics beside it."""
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        hidden_act="gelu",
    )
    model = CLIPVisionModelWithProjection(config)
    _spread(model)
    model.save_pretrained(folder / "image_encoder")
    path = folder / "image_encoder" / "model.safetensors"
    state = {
        key if key.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{key}": value
        for key, value in load_file(path).items()
    }
    save_file(state, path, metadata={"format": "pt"})
    extractor = CLIPImageProcessor(crop_size={"height": 28, "width": 28}, size={"shortest_edge": 28})
    extractor.save_pretrained(folder / "feature_extractor")


def write_i2vgenxl(folder: Path, seed: int = 0) -> Path:
    """An I2VGen-XL folder."""
    torch.manual_seed(seed)
    unet = I2VGenXLUNet(**{**MODELSCOPE_UNET, "num_attention_heads": 64})
    _spread(unet)
    unet.save_pretrained(folder / "unet")
    write_image_vae(folder / "vae")
    write_text_encoder(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    write_image_encoder(folder)
    write_scheduler(folder, I2VGENXL_SCHEDULER)
    index = {
        "_class_name": "I2VGenXLPipeline",
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "I2VGenXLUNet"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def write_consisti2v(folder: Path, seed: int = 0, **unet_settings) -> Path:
    """A ConsistI2V folder, with parameters that every published file has and no network reads."""
    from consistent_video.models.consisti2v_unet import ConsistI2VUNet

    torch.manual_seed(seed)
    config = {**CONSISTI2V_UNET, **unet_settings}
    unet = ConsistI2VUNet(**{key: value for key, value in config.items() if key != "_class_name"})
    _spread(unet)
    dead = {"down_blocks.0.conv3ds.0.time_emb_proj.weight": torch.zeros(64, 512)}
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file({**unet.state_dict(), **dead}, folder / "unet" / "diffusion_pytorch_model.safetensors")
    write_image_vae(folder / "vae")
    write_text_encoder(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer", "!")
    write_scheduler(folder, CONSISTI2V_SCHEDULER)
    (folder / "model_index.json").write_text(
        json.dumps({"_class_name": "ConditionalAnimationPipeline"}), encoding="utf-8"
    )
    return folder


def write_refiner(folder: Path) -> Path:
    """A second checkpoint of the ModelScope family."""
    return write_modelscope(folder, seed=2)


def write_sdxl(path: Path) -> Path:
    """See `tiny_sdxl`, which needs ComfyUI."""
    import tiny_sdxl

    return tiny_sdxl.write_sdxl(path)


def write_photomaker(path: Path) -> Path:
    """PhotoMaker v1 or v2 by the file's name; see `tiny_photomaker`, which needs ComfyUI."""
    import tiny_photomaker

    return tiny_photomaker.write_photomaker(path, "v2" if "v2" in path.name else "v1")


def write_motion_predictor(path: Path) -> Path:
    """See `tiny_motion_predictor`, which needs ComfyUI."""
    import tiny_motion_predictor

    return tiny_motion_predictor.write_motion_predictor(path)


def write_consisid(folder: Path) -> Path:
    """ConsisID with the face networks of its `face_encoder` folder; see `tiny_consisid`, which needs ComfyUI."""
    import tiny_consisid
    import tiny_faces
    from facexlib.parsing.bisenet import BiSeNet

    widths = {"LFE_id_dim": 512 + tiny_faces.EVA_OUTPUT, "LFE_vit_dim": tiny_faces.EVA_WIDTH}
    # Learned positions would tie clips to one size.
    tiny_consisid.write_consisid(folder, **widths, use_learned_positional_embeddings=False)
    encoder = folder / "face_encoder"
    tiny_faces.write_pack(encoder / "models" / "antelopev2")
    save_file(tiny_faces.eva_state(), encoder / "EVA02_CLIP_L_336_psz14_s6B.safetensors")
    torch.manual_seed(0)
    parser = {key: value.half() for key, value in BiSeNet(num_class=19).state_dict().items()}
    torch.save(parser, encoder / "parsing_bisenet.pth")
    return folder


def write_face_pack(folder: Path) -> Path:
    """A pack of insightface; see `tiny_faces`, which needs ComfyUI."""
    import tiny_faces

    tiny_faces.write_pack(folder)
    return folder


def write_scheduler(folder: Path, config: dict) -> None:
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config), encoding="utf-8")


def _modelscope_unet(seed: int, **settings) -> UNet3DConditionModel:
    torch.manual_seed(seed)
    unet = UNet3DConditionModel(**{**MODELSCOPE_UNET, **settings})
    _spread(unet)
    return unet


def write_original_modelscope(path: Path, seed: int = 0) -> Path:
    """The network of `write_modelscope` as one file in the original layout."""
    from consistent_video.loaders.original_modelscope import key_map

    state = _modelscope_unet(seed).state_dict()
    names = key_map(MODELSCOPE_UNET["block_out_channels"], MODELSCOPE_UNET["layers_per_block"])
    torch.save({old: state[new] for old, new in names.items()}, path)
    return path


def write_taesd(path: Path, seed: int = 0) -> Path:
    """One half of the tiny autoencoder for Stable Diffusion at its published size, which is small enough."""
    from comfy.taesd.taesd import Decoder, Encoder

    torch.manual_seed(seed)
    half = Encoder() if "encoder" in path.name else Decoder()
    # ComfyUI's layers leave their weights unset
    state = {
        key: torch.randn_like(value) * (0.02 if value.ndim == 1 else (2 / value[0].numel()) ** 0.5)
        for key, value in half.state_dict().items()
    }
    save_file(state, path)
    return path


def _spread(model: torch.nn.Module) -> None:
    """Move every parameter off its initial value: zero-initialised layers and constant norms would hide errors."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


CHECKPOINTS = {
    f"diffusers/{MODELSCOPE_NAME}": write_modelscope,
    f"diffusers/{I2VGENXL_NAME}": write_i2vgenxl,
    f"diffusion_models/{ORIGINAL_NAME}": write_original_modelscope,
    f"diffusers/{CONSISTI2V_NAME}": write_consisti2v,
    f"diffusers/{REFINER_NAME}": write_refiner,
    f"checkpoints/{SDXL_NAME}": write_sdxl,
    "diffusers/ConsisID-preview": write_consisid,
    "photomaker/photomaker-v1.bin": write_photomaker,
    "photomaker/photomaker-v2.bin": write_photomaker,
    "motion_predictors/motion_predictor.safetensors": write_motion_predictor,
    "insightface/models/buffalo_l": write_face_pack,
    "vae_approx/taesd_encoder.safetensors": write_taesd,
    "vae_approx/taesd_decoder.safetensors": write_taesd,
}


def build_all(models: Path) -> None:
    """Write every checkpoint that the example workflows name into a ComfyUI models folder; finished ones are kept."""
    for name, write in CHECKPOINTS.items():
        finished = models / name
        if not finished.exists():
            unfinished = finished.with_name(f".{finished.name}")
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            write(unfinished)
            unfinished.rename(finished)


def build_once(cache: Path) -> Path:
    """Return a folder below `cache` with every checkpoint, built on the first call and kept for later processes.

    It is built anew when a module that writes checkpoints, or a library that it builds them with, is another one.
    Nobody may write into it.
    """
    digest = hashlib.sha256(repr([torch.__version__, diffusers.__version__, transformers.__version__]).encode())
    for source in sorted(Path(__file__).parent.glob("tiny_*.py")):
        digest.update(source.read_bytes())
    finished = cache / digest.hexdigest()[:16]
    if not finished.is_dir():
        for other in cache.iterdir():
            outdated = not other.name.startswith("unfinished") or other.stat().st_mtime < time.time() - 3600
            if outdated and other != finished:
                shutil.rmtree(other, ignore_errors=True)
        unfinished = cache / f"unfinished-{os.getpid()}"
        build_all(unfinished)
        try:
            unfinished.rename(finished)
        except OSError:  # another process was faster
            shutil.rmtree(unfinished)
    return finished


if __name__ == "__main__":
    from comfy_process import enter

    enter()
    build_all(Path(sys.argv[1]))
