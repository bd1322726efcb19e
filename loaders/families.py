"""The published model families: how each is recognised, what it is made of, and where it is published."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..models.consisti2v import ConsistI2VModel
from ..models.consisti2v_unet import ConsistI2VUNet, drop_dead_keys
from ..models.i2vgenxl import I2VGenXLModel
from ..models.i2vgenxl_unet import I2VGenXLUNet
from ..models.modelscope import ModelScopeModel
from ..models.unet3d import ModelScopeUNet


@dataclass(frozen=True)
class Family:
    """One published system.

    Args:
        name: key used in node widgets.
        title: name shown to users.
        loader: display name of the node that loads its folders.
        repository: where the weights are published.
        component: sub-folder of the network in a diffusers folder.
        network_class: `_class_name` in that folder's config.json.
        marker: state dict key that tells the network from the other families'.
        network: our class of the network; built from config.json.
        model: how ComfyUI calls it.
        text_layer: hidden state of the text encoder that it takes, "last" or "penultimate".
        scheduler: scheduler/scheduler_config.json as published, for files that carry none.
        dtypes: types it computes well in, preferred first.
        blocks: end of its block types' names, "3D" or "2D"; 2-D blocks count heads, of 64 channels as published.
        prepare: takes published keys that the network has no place for out of a state dict.
    """

    name: str
    title: str
    loader: str
    repository: str
    component: str
    network_class: str
    marker: str
    network: type
    model: type
    text_layer: str
    scheduler: dict
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    blocks: str = "3D"
    prepare: Callable[[dict], dict] = dict


MODELSCOPE = Family(
    name="modelscope",
    title="ModelScope text-to-video",
    loader="Load ModelScope",
    repository="ali-vilab/text-to-video-ms-1.7b",
    component="unet",
    network_class="UNet3DConditionModel",
    marker="transformer_in.norm.weight",
    network=ModelScopeUNet,
    model=ModelScopeModel,
    text_layer="last",
    scheduler={
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    },
)

I2VGENXL = Family(
    name="i2vgenxl",
    title="I2VGen-XL",
    loader="Load I2VGen-XL",
    repository="ali-vilab/i2vgen-xl",
    component="unet",
    network_class="I2VGenXLUNet",
    marker="image_latents_proj_in.0.weight",
    network=I2VGenXLUNet,
    model=I2VGenXLModel,
    text_layer="penultimate",
    scheduler={
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.0001,
        "beta_end": 0.02,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "thresholding": False,
        "timestep_spacing": "leading",
    },
)

CONSISTI2V = Family(
    name="consisti2v",
    title="ConsistI2V",
    loader="Load ConsistI2V",
    repository="TIGER-Lab/ConsistI2V",
    component="unet",
    network_class="VideoLDMUNet3DConditionModel",
    marker="frame_stride_embedding.linear_1.weight",
    network=ConsistI2VUNet,
    model=ConsistI2VModel,
    text_layer="last",
    scheduler={
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 1,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
    },
    blocks="2D",
    prepare=drop_dead_keys,
)

# Families that share keys come after those with a marker of their own.
FAMILIES = {family.name: family for family in (CONSISTI2V, I2VGENXL, MODELSCOPE)}
