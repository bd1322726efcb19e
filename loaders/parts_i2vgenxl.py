"""The code of I2VGen-XL."""

from ..models import unet3d
from ..models.i2vgenxl import I2VGenXLModel
from ..models.i2vgenxl_unet import I2VGenXLUNet
from .family_parts import Parts
from .text_encoder import load_text_encoder, load_text_encoder_patcher
from .vae import frame_latent_format, load_vae, load_vae_patcher

PARTS = Parts(
    network=I2VGenXLUNet,
    model=I2VGenXLModel,
    replacements=unet3d.REPLACEMENTS,
    load_text_encoder=load_text_encoder,
    load_text_encoder_patcher=load_text_encoder_patcher,
    load_vae=load_vae,
    load_vae_patcher=load_vae_patcher,
    latent_format=frame_latent_format,
)
