"""The code of ConsisID."""

from ..models import consisid_transformer
from ..models.consisid import ConsisIDModel
from . import consisid_config
from .cogvideox_vae import clip_latent_format, load_cogvideox_vae, load_cogvideox_vae_patcher
from .family_parts import Parts
from .t5_text_encoder import load_t5_patcher, load_t5_text_encoder

PARTS = Parts(
    network=consisid_transformer.ConsisIDTransformer,
    model=ConsisIDModel,
    replacements=consisid_transformer.REPLACEMENTS,
    load_text_encoder=load_t5_text_encoder,
    load_text_encoder_patcher=load_t5_patcher,
    load_vae=load_cogvideox_vae,
    load_vae_patcher=load_cogvideox_vae_patcher,
    latent_format=clip_latent_format,
    read_fields=consisid_transformer.read_fields,
    describe=consisid_config.network_config,
)
