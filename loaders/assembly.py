"""Configuration + weights + schedule -> MODEL."""

from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import torch

from ..models.base import VideoModelConfig
from ..models.latent_format import FrameLatentFormat
from ..models.unet3d import REPLACEMENTS
from ..samplers import schedules
from .families import Family
from .folders import check_family, read_config, read_config_or
from .network import WEIGHT_DTYPES, build_on_meta, choose_dtypes, load_network
from .vae import scaling_factor
from .weights import HALF_TYPES, find_weights, read_weights


def load_folder_network(
    family: Family, folder: Path, weight_dtype: str, disable_dynamic: bool = False
) -> comfy.model_patcher.ModelPatcher:
    """Load the network of a diffusers folder.

    Args:
        family: what the folder has to be.
        folder: holds the network's folder, vae/config.json and scheduler.
        weight_dtype: storage type of the weights, a key of `WEIGHT_DTYPES`.
        disable_dynamic: ComfyUI asks so for a patcher that does not stream weights on demand.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, of another family, or does not fit its configuration.
    """
    check_family(folder, family)
    component = folder / family.component
    network = build_on_meta(family.network, read_config(component / "config.json"), str(component / "config.json"))
    half = WEIGHT_DTYPES[weight_dtype] in HALF_TYPES
    state = family.prepare(read_weights(find_weights(component, "diffusion_pytorch_model", half)))
    scheduler = read_config_or(folder / "scheduler" / "scheduler_config.json", family.scheduler)
    latent_format = FrameLatentFormat(scaling_factor(folder))
    patcher = assemble(family, network, state, weight_dtype, scheduler, latent_format, str(component), disable_dynamic)
    patcher.cached_patcher_init = (load_folder_network, (family, folder, weight_dtype))
    return patcher


def assemble(
    family: Family,
    network: torch.nn.Module,
    state: dict[str, torch.Tensor],
    weight_dtype: str,
    scheduler: dict,
    latent_format: FrameLatentFormat,
    source: str,
    disable_dynamic: bool = False,
) -> comfy.model_patcher.ModelPatcher:
    """Give a network built on the meta device its weights, its sampling space and a patcher.

    Args:
        scheduler: diffusers scheduler configuration.
        source: what to call the weights in an error.

    Raises:
        ValueError: the weights do not fit the network, or the schedule is not one that can be computed.
    """
    dtype, manual_cast_dtype = choose_dtypes(state, weight_dtype, list(family.dtypes))
    config = VideoModelConfig(
        dtype,
        manual_cast_dtype,
        latent_format,
        model_channels=network.config.block_out_channels[0],
        sampling_settings={"timesteps": scheduler.get("num_train_timesteps", 1000)},
    )
    model = family.model(
        config,
        scheduler,
        schedules.table_sigmas(scheduler),
        lambda operations: load_network(network, state, dtype, operations, REPLACEMENTS, source),
    )
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    offload_device = comfy.model_management.unet_offload_device()
    patcher = patcher_class(model, comfy.model_management.get_torch_device(), offload_device)
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    return patcher
