"""ModelScope text-to-video: diffusers folders and single files of the network."""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch

from ..models.base import VideoModelConfig
from ..models.latent_format import FrameLatentFormat
from ..models.modelscope import ModelScopeModel
from ..models.unet3d import REPLACEMENTS, ModelScopeUNet
from ..samplers import schedules
from .families import MODELSCOPE
from .folders import check_family, read_config, read_config_or
from .network import WEIGHT_DTYPES, build_on_meta, choose_dtypes, load_network
from .text_encoder import load_text_encoder, load_text_encoder_patcher
from .vae import FrameVAE, load_vae, load_vae_patcher, scaling_factor
from .weights import HALF_TYPES, find_weights, read_weights

SUPPORTED_DTYPES = [torch.float16, torch.bfloat16, torch.float32]

# scheduler/scheduler_config.json as published; used for single files, which carry none.
PUBLISHED_SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}


def load_folder(folder: Path, weight_dtype: str) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, FrameVAE]:
    """Load a ModelScope diffusers folder.

    Args:
        folder: holds unet, vae, text_encoder, tokenizer, scheduler.
        weight_dtype: storage type of the network's weights, a key of `WEIGHT_DTYPES`.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, of another family, or does not fit its configuration.
    """
    half = WEIGHT_DTYPES[weight_dtype] in HALF_TYPES
    model = load_folder_network(folder, weight_dtype)
    clip = load_text_encoder(folder, "last", half)
    clip.patcher.cached_patcher_init = (load_text_encoder_patcher, (folder, "last", half))
    vae = load_vae(folder, half)
    vae.patcher.cached_patcher_init = (load_vae_patcher, (folder, half))
    return model, clip, vae


def load_folder_network(
    folder: Path, weight_dtype: str, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """The folder's network alone."""
    check_family(folder, MODELSCOPE)
    config_file = folder / "unet" / "config.json"
    network = build_on_meta(ModelScopeUNet, read_config(config_file), str(config_file))
    state = read_weights(
        find_weights(folder / "unet", "diffusion_pytorch_model", WEIGHT_DTYPES[weight_dtype] in HALF_TYPES)
    )
    scheduler = read_config_or(folder / "scheduler" / "scheduler_config.json", PUBLISHED_SCHEDULER)
    latent_format = FrameLatentFormat(scaling_factor(folder))
    patcher = assemble(network, state, weight_dtype, scheduler, latent_format, str(folder / "unet"), disable_dynamic)
    patcher.cached_patcher_init = (load_folder_network, (folder, weight_dtype))
    return patcher


def assemble(
    network: ModelScopeUNet,
    state: dict[str, torch.Tensor],
    weight_dtype: str,
    scheduler: dict,
    latent_format: FrameLatentFormat,
    source: str,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """Weights + network + schedule -> MODEL.

    Raises:
        ValueError: the weights do not fit the network (`source` names them), or the schedule is not one this family
            can use.
    """
    dtype, manual_cast_dtype = choose_dtypes(state, weight_dtype, SUPPORTED_DTYPES)
    sampling = {
        "timesteps": scheduler.get("num_train_timesteps", 1000),
        "zsnr": scheduler.get("rescale_betas_zero_snr", False),
    }
    config = VideoModelConfig(dtype, manual_cast_dtype, latent_format, network.config.block_out_channels[0], sampling)
    sigmas = schedules.table_sigmas(scheduler)
    model = ModelScopeModel(
        config,
        scheduler,
        sigmas,
        lambda operations: load_network(network, state, dtype, operations, REPLACEMENTS, source),
    )
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    load_device = comfy.model_management.get_torch_device()
    patcher = patcher_class(model, load_device=load_device, offload_device=comfy.model_management.unet_offload_device())
    if not comfy.model_management.is_device_cpu(patcher.offload_device):
        model.to(patcher.offload_device)
    return patcher
