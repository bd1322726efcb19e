"""The code of ModelScope text-to-video."""

from functools import partial

from ..models import unet3d
from ..models.modelscope import ModelScopeModel
from .family_parts import Parts
from .text_encoder import load_text_encoder, load_text_encoder_patcher
from .vae import frame_latent_format, load_vae, load_vae_patcher

# Prompts of OpenCLIP are padded with token 0, whose word is this.
PAD = "!"

PARTS = Parts(
    network=unet3d.ModelScopeUNet,
    model=ModelScopeModel,
    replacements=unet3d.REPLACEMENTS,
    load_text_encoder=partial(load_text_encoder, published_pad=PAD),
    load_text_encoder_patcher=partial(load_text_encoder_patcher, published_pad=PAD),
    load_vae=load_vae,
    load_vae_patcher=load_vae_patcher,
    latent_format=frame_latent_format,
)
