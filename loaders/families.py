"""The published model families: how each is recognised, what it is made of, and where it is published.

A family's code (`parts_<name>.py` and what it imports) is imported when it is first needed, so that one that a newer
ComfyUI breaks leaves the others alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

import torch

from .family_parts import Parts
from .host import blame

CLIP, T5 = "CLIP", "T5"


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
        text_layer: hidden state of the text encoder that it takes, "last" or "penultimate".
        scheduler: scheduler/scheduler_config.json as published, for files that carry none.
        dtypes: types it computes well in, preferred first.
        blocks: end of its block types' names, "3D" or "2D"; 2-D blocks count heads, of 64 channels as published.
        width: channels of the network's first block by its configuration.
        text_encoder: `CLIP` or `T5`.
    """

    name: str
    title: str
    loader: str
    repository: str
    component: str
    network_class: str
    marker: str
    text_layer: str
    scheduler: dict
    dtypes: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16, torch.float32)
    blocks: str = "3D"
    width: Callable[[Mapping], int] = lambda config: config.block_out_channels[0]
    text_encoder: str = CLIP

    @cached_property
    def parts(self) -> Parts:
        """The family's code; errors of `import_parts`."""
        return self.import_parts()

    def import_parts(self) -> Parts:
        """Import the family's code.

        Raises:
            RuntimeError: it cannot be imported in this ComfyUI.
        """
        try:
            return import_module(f".parts_{self.name}", __package__).PARTS
        except Exception as error:
            raise RuntimeError(f"{self.title} cannot be used: {blame(error)}") from error

    @property
    def network(self) -> type:
        """Return the pack's class of the network; see `Parts`."""
        return self.parts.network

    @property
    def model(self) -> type:
        """Return the class by which ComfyUI calls the network; see `Parts`."""
        return self.parts.model

    @property
    def replacements(self) -> dict[type, type]:
        """Return the pack's class for each class of diffusers' modules; see `Parts`."""
        return self.parts.replacements


MODELSCOPE = Family(
    name="modelscope",
    title="ModelScope text-to-video",
    loader="Load ModelScope",
    repository="ali-vilab/text-to-video-ms-1.7b",
    component="unet",
    network_class="UNet3DConditionModel",
    marker="transformer_in.norm.weight",
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
)

CONSISID = Family(
    name="consisid",
    title="ConsisID",
    loader="Load ConsisID",
    repository="BestWishYsh/ConsisID-preview",
    component="transformer",
    network_class="ConsisIDTransformer3DModel",
    marker="local_facial_extractor.latents",
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
    # trained in bfloat16; in float16 networks of this class give black frames (zai-org/CogVideo, issues 559 and 637)
    dtypes=(torch.bfloat16, torch.float32),
    width=lambda config: config.num_attention_heads * config.attention_head_dim,
    text_encoder=T5,
)

# Families that share keys come after those with a marker of their own.
FAMILIES = {family.name: family for family in (CONSISTI2V, I2VGENXL, MODELSCOPE, CONSISID)}
