"""ConsisID in ComfyUI."""

import math
from collections.abc import Sequence

import comfy.conds
import comfy.model_management
import torch

from .base import COPIES_OF_KEPT, VideoModel
from .consisid_blocks import DEVICE_ROWS, PATCHES, REPLACEMENTS
from .parts import Angles, StartOfClip, Tokens
from .served import Served

PICTURE = "consisid_picture"
KEY_POINTS = "consisid_key_points"
IDENTITY = "consisid_identity"
VISION = "consisid_vision"
STRENGTH = "consisid_strength"

NEEDED = "ConsisID needs a face: connect both prompts through ConsisID Conditioning."

# Elements alive at the peak of one call per token and channel, counted at the published width (a test counts them
# again). In attention: the block's input, its norm, queries, keys, values, the result. In a feed-forward layer: the
# block's input, its sum with the attention, its norm, the result; and the hidden layer of the chunk in work, four times
# as wide, before and after the activation.
ATTENTION_ELEMENTS = 6.05
FEED_FORWARD_ELEMENTS = 4.05
CHUNK_ELEMENTS = 8.0


def picture_latents(picture: torch.Tensor, key_points: torch.Tensor | None, frames: int) -> torch.Tensor:
    """The picture's latent (B, C, 1, h, w), then that of the key points, if any, then zeros: (B, C, F', h, w)."""
    clip = picture.new_zeros(*picture.shape[:2], frames, *picture.shape[-2:])
    clip[:, :, :1] = picture
    if key_points is not None:
        clip[:, :, 1:2] = key_points
    return clip


class ConsisIDModel(VideoModel):
    """`ConsisIDTransformer` with everything that only depends on the conditioning computed once per sampling run."""

    served = Served(
        "ConsisID",
        patches=PATCHES,
        replacements=REPLACEMENTS,
        pictures=(PICTURE, KEY_POINTS),
        reads=(IDENTITY, VISION, STRENGTH),
        controls=False,
        windows=(0, 2),
        patch=2,
    )

    def call_elements(self, input_shape: Sequence[int]) -> float:
        """Elements of activations at the peak of a call for latents of `input_shape` (B, C, F', h, w)."""
        tokens = input_shape[0] * (self._picture_tokens(input_shape) + self.diffusion_model.config.max_text_seq_length)
        feed_forward = FEED_FORWARD_ELEMENTS * tokens + CHUNK_ELEMENTS * min(tokens, DEVICE_ROWS)
        return max(ATTENTION_ELEMENTS * tokens, feed_forward) * self._width

    def kept_elements(self, input_shape: Sequence[int]) -> dict[str, float]:
        """Tokens of text and picture, keys and values of the face, and the rotary table, which is never joined."""
        config, picture = self.diffusion_model.config, self._picture_tokens(input_shape)
        tokens = picture + config.max_text_seq_length
        kept = {"text_tokens": config.max_text_seq_length * self._width, "picture_tokens": picture * self._width}
        if config.is_train_face:
            heads = config.cross_attn_dim_head * config.cross_attn_num_heads
            attentions = config.num_layers // config.cross_attn_interval
            kept["face_keys_values"] = config.LFE_num_querie * 2 * heads * attentions
        if config.use_rotary_positional_embeddings:
            single = 4 / comfy.model_management.dtype_size(self.get_dtype_inference())
            kept["rotary_table"] = tokens * 2 * config.attention_head_dim * single / COPIES_OF_KEPT
        return kept

    def _picture_tokens(self, input_shape: Sequence[int]) -> float:
        return math.prod(input_shape[2:]) / self.diffusion_model.config.patch_size**2

    @property
    def _width(self) -> int:
        return self.model_config.unet_config["model_channels"]

    def text_states(self, **kwargs) -> torch.Tensor:
        """The prompt's text states (B, T, D) on the device and in the type of the computation.

        Args:
            cross_attn, device: what ComfyUI hands to `extra_conds`.

        Raises:
            ValueError: there is no prompt, another text encoder made it, or it has another number of tokens.
        """
        text, config = kwargs.get("cross_attn"), self.diffusion_model.config
        found = None if text is None else text.shape[-1]
        if found != config.text_embed_dim:
            raise ValueError(
                f"The prompt has {found or 'no'} values per token, but ConsisID needs {config.text_embed_dim}. Encode "
                "it with the CLIP that Load ConsisID returns, or with Load CLIP of a T5-XXL and type cogvideox."
            )
        if text.shape[1] != config.max_text_seq_length:
            raise ValueError(
                f"The prompt has {text.shape[1]} tokens, but ConsisID reads exactly {config.max_text_seq_length}. "
                "Shorten it, and use the CLIP that Load ConsisID returns, or Load CLIP with type cogvideox, which pads."
            )
        return comfy.model_management.cast_to_device(text, kwargs["device"], self.get_dtype_inference())

    def extra_conds(self, **kwargs) -> dict:
        """Conditioning of one prompt, made by the conditioning node.

        Raises:
            ValueError: the conditioning lacks the face, or was made for clips of another size.
        """
        conds = super().extra_conds(**kwargs)
        text, picture = self.text_states(**kwargs), self._picture(**kwargs)
        identity, vision = self._face(**kwargs)
        strength = torch.tensor([float(kwargs[STRENGTH])], device=kwargs["device"])
        if kwargs.get("hooks") is not None:
            # Weights that change during the run: the network computes what depends on them in every call.
            conds["c_crossattn"] = comfy.conds.CONDRegular(text)
            conds["picture"] = StartOfClip(picture)
            conds["identity"] = comfy.conds.CONDRegular(identity)
            conds["vision_states"] = comfy.conds.CONDList(vision)
            conds["strength"] = comfy.conds.CONDRegular(strength)
            return conds
        condition = self.diffusion_model.condition(text, picture, identity, vision, strength)
        conds.pop("c_crossattn")
        conds["text_tokens"] = comfy.conds.CONDRegular(condition.text)
        side = self.diffusion_model.config.patch_size
        grid = (picture.shape[2], picture.shape[3] // side, picture.shape[4] // side)
        conds["picture_tokens"] = Tokens(condition.picture, grid=grid, side=side)
        conds["rotary"] = comfy.conds.CONDConstant((None,))
        if condition.rotary is not None:
            conds["rotary"] = Angles((condition.rotary,), 2, condition.text.shape[1], grid, side)
        if condition.face is not None:
            conds["face_keys_values"] = comfy.conds.CONDRegular(condition.face)
        return conds

    def _picture(self, **kwargs) -> torch.Tensor:
        """Scaled latents of the face's picture and key points in the frames of the clip to sample."""
        if PICTURE not in kwargs:
            raise ValueError(NEEDED)
        noise, config = kwargs["noise"], self.diffusion_model.config
        if any(side % config.patch_size for side in noise.shape[-2:]):
            raise ValueError(
                f"The latent to sample is {tuple(noise.shape[-2:])} (height, width), but ConsisID works on patches of "
                f"{config.patch_size}. Use the latent of ConsisID Conditioning."
            )
        latents = [kwargs[PICTURE], kwargs[KEY_POINTS]] if config.is_kps else [kwargs[PICTURE]]
        if noise.shape[2] < len(latents):
            raise ValueError("This checkpoint is told key points in the second latent frame: make 5 frames or more.")
        expected = (config.in_channels - config.out_channels, 1, *noise.shape[-2:])
        if latents[0].shape[1:] != expected:
            raise ValueError(
                f"The face's picture was prepared as a latent of {tuple(latents[0].shape[1:])} (channels, frames, "
                f"height, width), but the latent to sample needs {expected}. Sample the latent of ConsisID "
                "Conditioning, with the VAE of the checkpoint."
            )
        picture, *points = (self.latent_format.process_picture(latent) for latent in latents)
        clip = picture_latents(picture, points[0] if points else None, noise.shape[2])
        return comfy.model_management.cast_to_device(clip, kwargs["device"], self.get_dtype_inference())

    def _face(self, **kwargs) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Identity embedding and vision states of the face."""
        config = self.diffusion_model.config
        identity, vision = kwargs[IDENTITY], kwargs[VISION]
        widths = [state.shape[-1] for state in vision]
        if config.is_train_face and (
            identity.shape[-1] != config.LFE_id_dim or widths != [config.LFE_vit_dim] * config.LFE_num_scale
        ):
            raise ValueError(
                f"The face has an identity of {identity.shape[-1]} values and vision states of {widths}, but this "
                f"checkpoint needs {config.LFE_id_dim} and {config.LFE_num_scale} of {config.LFE_vit_dim}. Encode it "
                "with the face networks published with ConsisID."
            )
        device, dtype = kwargs["device"], self.get_dtype_inference()
        cast = [comfy.model_management.cast_to_device(tensor, device, dtype) for tensor in (identity, *vision)]
        return cast[0], cast[1:]
