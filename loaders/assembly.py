"""Configuration + weights + schedule -> MODEL."""

from pathlib import Path
from types import SimpleNamespace

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP

from ..models import network_description, parameter_patches
from ..models.adopt import bring_small_tensors
from ..models.base import VideoModelConfig
from ..samplers import run_start, schedules
from . import lora_files
from .config_fields import SCHEDULER
from .families import Family
from .folders import check_family, read_config, read_config_or
from .network import WEIGHT_DTYPES, build_on_meta, choose_dtypes, load_network
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
    network = build_network(family, component)
    half = WEIGHT_DTYPES[weight_dtype] in HALF_TYPES
    state = family.parts.prepare(read_weights(find_weights(component, "diffusion_pytorch_model", half)))
    scheduler = read_scheduler(family, folder)
    patcher = assemble(
        family,
        network,
        state,
        weight_dtype,
        scheduler,
        family.parts.latent_format(folder),
        str(component),
        disable_dynamic,
    )
    patcher.cached_patcher_init = (load_folder_network, (family, folder, weight_dtype))
    return patcher


def read_scheduler(family: Family, folder: Path) -> dict:
    """The scheduler configuration of a folder, or the published one.

    Raises:
        ValueError: the configuration is damaged.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_config_or(path, family.scheduler)
    SCHEDULER.check(config, path)
    return config


def build_network(family: Family, component: Path) -> torch.nn.Module:
    """The network that `<component>/config.json` describes, on the meta device.

    Raises:
        FileNotFoundError, ValueError: the configuration is missing, damaged, or describes no working network.
    """
    config_file = component / "config.json"
    return build_on_meta(family.network, family.parts.read_fields(read_config(config_file)), str(config_file))


def published_latent_format(family: Family) -> comfy.latent_formats.LatentFormat:
    """The family's latent space, scaled as published."""
    return family.parts.latent_format(None)


def assemble(
    family: Family,
    network: torch.nn.Module,
    state: dict[str, torch.Tensor],
    weight_dtype: str,
    scheduler: dict,
    latent_format: comfy.latent_formats.LatentFormat,
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
    dtype, manual_cast_dtype = choose_dtypes(state, weight_dtype, list(family.dtypes), family.title)
    config = VideoModelConfig(
        dtype,
        manual_cast_dtype,
        latent_format,
        model_channels=family.width(network.config),
        sampling_settings=schedules.sampling_settings(scheduler),
    )
    model = family.model(
        config,
        scheduler,
        schedules.table_sigmas(scheduler),
        lambda operations: load_network(network, state, dtype, operations, family.parts.replacements, source),
    )
    fields = vars(network.config) if isinstance(network.config, SimpleNamespace) else network.config
    fields = {key: value for key, value in fields.items() if not key.startswith("_")}
    model.description = network_description.to_tensor(family.name, fields, scheduler, latent_format.factors)
    patcher_class = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    offload_device = comfy.model_management.unet_offload_device()
    patcher = patcher_class(model, comfy.model_management.get_torch_device(), offload_device)
    parameter_patches.install(patcher, family.title)
    lora_files.watch(patcher, family.title)
    patcher.add_callback(CallbacksMP.ON_LOAD, bring_small_tensors)
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    run_start.install(patcher)
    return patcher
