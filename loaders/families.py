"""The published model families: how each is recognised, what it is made of, and where it is published."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from ..models import consisid_transformer, unet3d
from ..models.consisid import ConsisIDModel
from ..models.consisti2v import ConsistI2VModel
from ..models.consisti2v_unet import ConsistI2VUNet, drop_dead_keys
from ..models.i2vgenxl import I2VGenXLModel
from ..models.i2vgenxl_unet import I2VGenXLUNet
from ..models.modelscope import ModelScopeModel
from ..models.unet3d import ModelScopeUNet
from . import consisid_config

CLIP, T5 = "CLIP", "T5"
FRAME_VAE, COGVIDEOX_VAE = "AutoencoderKL", "AutoencoderKLCogVideoX"


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
        read_fields: takes fields that mean something else to the network than to its publishers out of config.json.
        describe: configuration of the network with these weights; None: that of a UNet.
        replacements: diffusers class of a module -> ours.
        width: channels of the network's first block by its configuration.
        text_encoder: `CLIP` or `T5`.
        autoencoder: `FRAME_VAE` or `COGVIDEOX_VAE`.
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
    read_fields: Callable[[dict], dict] = dict
    describe: Callable[[Mapping[str, torch.Tensor]], dict] | None = None
    replacements: dict[type, type] = field(default_factory=lambda: unet3d.REPLACEMENTS)
    width: Callable[[Mapping], int] = lambda config: config.block_out_channels[0]
    text_encoder: str = CLIP
    autoencoder: str = FRAME_VAE


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

CONSISID = Family(
    name="consisid",
    title="ConsisID",
    loader="Load ConsisID",
    repository="BestWishYsh/ConsisID-preview",
    component="transformer",
    network_class="ConsisIDTransformer3DModel",
    marker="local_facial_extractor.latents",
    network=consisid_transformer.ConsisIDTransformer,
    model=ConsisIDModel,
    text_layer="last",
    scheduler={
        "_class_name": "CogVideoXDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "steps_offset": 0,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "snr_shift_scale": 1.0,
        "timestep_spacing": "trailing",
    },
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
    read_fields=consisid_transformer.read_fields,
    describe=consisid_config.network_config,
    replacements=consisid_transformer.REPLACEMENTS,
    width=lambda config: config.num_attention_heads * config.attention_head_dim,
    text_encoder=T5,
    autoencoder=COGVIDEOX_VAE,
)

# Families that share keys come after those with a marker of their own.
FAMILIES = {family.name: family for family in (CONSISTI2V, I2VGENXL, MODELSCOPE, CONSISID)}
