"""I2VGen-XL in ComfyUI."""

import math
from collections.abc import Sequence

import comfy.conds
import comfy.model_management
import torch

from .clip_latents import check_clip_count, check_picture_latent
from .i2vgenxl_conditioning import FPS, IMAGE_EMBEDDING, IMAGE_LATENT
from .parts import OfFrames, PictureAndPositions, Whole
from .served import Served
from .unet3d_model import TEXT_TOKENS, UNet3DModel

# Of the first latent and of an image embedding, see `I2VGenXLUNet`.
PICTURE_TOKENS = 64 + 4


def image_latents(first: torch.Tensor, frames: int) -> torch.Tensor:
    """The picture's latent (B, 4, h, w), then planes of the frames' positions i / (F - 1): (B, 4, F, h, w)."""
    positions = torch.arange(frames, device=first.device, dtype=first.dtype) / max(frames - 1, 1)
    planes = positions.view(1, 1, -1, 1, 1).repeat(*first.shape[:2], 1, *first.shape[2:])
    planes[:, :, 0] = first
    return planes


class I2VGenXLModel(UNet3DModel):
    """`I2VGenXLUNet` with everything that only depends on the conditioning computed once per sampling run."""

    served = Served("I2VGen-XL", pictures=(IMAGE_LATENT, IMAGE_EMBEDDING), reads=(FPS,))
    text_keys_values = "keys_values"

    def kept_elements(self, input_shape: Sequence[int]) -> dict[str, float]:
        """Tokens of text and picture, their keys and values, and the picture's planes."""
        tokens = TEXT_TOKENS + PICTURE_TOKENS
        widths = {name: tokens * width for name, width in self._token_widths.items()}
        return widths | {"picture": math.prod(input_shape[1:])}

    def extra_conds_shapes(self, **kwargs) -> dict:
        """Return the shapes that `UNet3DModel` counts; an image embedding for each frame brings tokens for each."""
        shapes, text, embedding = (
            super().extra_conds_shapes(**kwargs),
            kwargs.get("cross_attn"),
            kwargs.get(IMAGE_EMBEDDING),
        )
        if text is None or embedding is None:
            return shapes
        size = [text.shape[0], embedding.shape[1], text.shape[1] + PICTURE_TOKENS]
        return shapes | {name: [*size, width] for name, width in self._token_widths.items()}

    @property
    def _token_widths(self) -> dict[str, int]:
        network = self.diffusion_model
        return {"context_tokens": network.config.cross_attention_dim, self.text_keys_values: network.text_width}

    @staticmethod
    def without_picture(extra: dict) -> dict:
        """A prompt's extras for the guidance branch that sees no picture: its latent and its embedding are zero."""
        return {**extra, **{key: torch.zeros_like(extra[key]) for key in (IMAGE_LATENT, IMAGE_EMBEDDING)}}

    def _apply_model(self, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):
        self.check_size(kwargs["picture"] if "picture" in kwargs else kwargs["image_latents"], x)
        return super()._apply_model(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def extra_conds(self, **kwargs) -> dict:
        """Conditioning of one prompt, made by the conditioning node.

        Raises:
            ValueError: the conditioning lacks the picture, or was made for clips of another size.
        """
        conds = super().extra_conds(**kwargs)
        text, fps, picture, embedding = self._inputs(**kwargs)
        if kwargs.get("hooks") is not None:
            conds["c_crossattn"] = comfy.conds.CONDCrossAttn(text)
            conds["image_latents"] = PictureAndPositions(picture, picture, lambda planes: planes)
            conds["image_embeddings"] = (OfFrames if embedding.shape[1] > 1 else Whole)(embedding)
            conds["fps"] = Whole(fps)
            return conds
        condition = self.diffusion_model.condition(text, picture, embedding, fps)
        many = condition.keys_values.ndim == 4
        tokens = OfFrames if many else comfy.conds.CONDCrossAttn
        conds["context_tokens"], conds["keys_values"] = tokens(condition.context), tokens(condition.keys_values)
        conds["picture"] = PictureAndPositions(condition.picture, picture, self.diffusion_model.encode_picture)
        conds["fps_embedding"] = Whole(condition.fps)
        return conds

    def _inputs(self, **kwargs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Text, frame rate, image latents and image embedding of one prompt, for as many clips as it describes."""
        if IMAGE_LATENT not in kwargs:
            raise ValueError("I2VGen-XL needs a picture: connect both prompts through I2VGen-XL Conditioning.")
        noise, dtype = kwargs["noise"], self.get_dtype_inference()
        first = self.process_latent_in(kwargs[IMAGE_LATENT])
        check_picture_latent("picture", first, noise, "I2VGen-XL Conditioning")
        embedding = kwargs[IMAGE_EMBEDDING]
        width = self.diffusion_model.config.cross_attention_dim
        if embedding.shape[-1] != width:
            raise ValueError(
                f"The vision tower embeds a picture in {embedding.shape[-1]} values, but I2VGen-XL needs {width}. "
                "Use the CLIP_VISION that Load I2VGen-XL returns (OpenCLIP ViT-H/14)."
            )
        if embedding.shape[1] not in (1, noise.shape[2]):
            raise ValueError(
                f"The image embedding has {embedding.shape[1]} frames, but the latent to sample has {noise.shape[2]}."
            )
        check_clip_count(first.shape[0], noise.shape[0])
        parts = (self.text_states(**kwargs), image_latents(first, noise.shape[2]), embedding)
        clips = max(part.shape[0] for part in parts)
        parts = [_repeat(comfy.model_management.cast_to_device(part, kwargs["device"], dtype), clips) for part in parts]
        fps = torch.full((clips,), float(kwargs[FPS]), device=kwargs["device"])
        return parts[0], fps, parts[1], parts[2]


def _repeat(tensor: torch.Tensor, clips: int) -> torch.Tensor:
    return tensor.expand(clips, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor
