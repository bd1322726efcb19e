"""The code of ConsistI2V."""

from functools import partial

from ..models import unet3d
from ..models.consisti2v import ConsistI2VModel
from ..models.consisti2v_unet import ConsistI2VUNet, drop_dead_keys
from .family_parts import Parts
from .text_encoder import load_text_encoder, load_text_encoder_patcher
from .vae import frame_latent_format, load_vae, load_vae_patcher

# Prompts of OpenCLIP are padded with token 0, whose word is this.
PAD = "!"

PARTS = Parts(
    network=ConsistI2VUNet,
    model=ConsistI2VModel,
    replacements=unet3d.REPLACEMENTS,
    load_text_encoder=partial(load_text_encoder, published_pad=PAD),
    load_text_encoder_patcher=partial(load_text_encoder_patcher, published_pad=PAD),
    load_vae=load_vae,
    load_vae_patcher=load_vae_patcher,
    latent_format=frame_latent_format,
    prepare=drop_dead_keys,
)
