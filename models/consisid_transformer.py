"""ConsisID's network as a ComfyUI diffusion model.

Of its inputs only the noisy clip and the timestep change during a run. What the text, the picture and the face
contribute is computed by `condition` once, and handed to every call.
"""

from dataclasses import dataclass
from functools import partial, wraps

import comfy.model_management
import comfy.ops
import comfy.patcher_extension
import torch
from diffusers import ConsisIDTransformer3DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import CogVideoXLayerNormZero
from diffusers.models.transformers.consisid_transformer_3d import (
    ConsisIDBlock,
    LocalFacialExtractor,
    PerceiverAttention,
    PerceiverCrossAttention,
)
from torch.nn.functional import linear

from .adopt import is_bypassed
from .consisid_blocks import ChunkedGELUFeedForward, JointAttention, JointBlock, JointNorm
from .consisid_identity import FaceAttention, FaceExtractor, ResamplerAttention
from .consisid_positions import rotary_table

REPLACEMENTS = {
    Attention: JointAttention,
    FeedForward: ChunkedGELUFeedForward,
    CogVideoXLayerNormZero: JointNorm,
    ConsisIDBlock: JointBlock,
    LocalFacialExtractor: FaceExtractor,
    PerceiverAttention: ResamplerAttention,
    PerceiverCrossAttention: FaceAttention,
}

# The first releases of the configuration name these; their network was built without reading any LFE_ field.
UNREAD_FIELDS = ("LFE_heads", "LFE_num_tokens")


def read_fields(config: dict) -> dict:
    """A published configuration without the fields of the face extractor that the release it belongs to never read."""
    if any(field in config for field in UNREAD_FIELDS):
        return {key: value for key, value in config.items() if not key.startswith("LFE_")}
    return dict(config)


@dataclass(frozen=True)
class Condition:
    """What does not change during a run.

    Args:
        text: text tokens at their positions, (B, T, C).
        picture: the picture's share of the clip's tokens, with bias and positions, (B, N, C).
        rotary: see `consisid_positions.rotary_table`; None without rotary positions.
        face: keys and values of every face attention, (B, Q, W); None for a network without them.
    """

    text: torch.Tensor
    picture: torch.Tensor
    rotary: torch.Tensor | None
    face: torch.Tensor | None


class ConsisIDTransformer(ConsisIDTransformer3DModel):
    """A face, a picture of it and a text to video: diffusers' `ConsisIDTransformer3DModel` called by ComfyUI.

    Raises:
        ValueError: a configuration whose face attentions do not come out even.
    """

    # Not layers, hence never converted to the type of the computation on the fly: 8-bit storage would round them.
    keep_in_fp32 = ("patch_embed.pos_embedding", "local_facial_extractor.latents", "local_facial_extractor.proj_out")

    @wraps(ConsisIDTransformer3DModel.__init__)
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        config = self.config
        if config.is_train_face and config.num_layers % config.cross_attn_interval:
            raise ValueError(
                f"num_layers {config.num_layers} is no multiple of cross_attn_interval {config.cross_attn_interval}"
            )
        if config.use_learned_positional_embeddings:
            # A buffer to diffusers: as a parameter, merges and LoRAs reach it.
            positions = self.patch_embed.pos_embedding
            self.patch_embed.pos_embedding = torch.nn.Parameter(positions, requires_grad=False)
        elif self.positioned:
            # Computed for each clip; this copy is in no file.
            self.patch_embed.pos_embedding = None

    @property
    def positioned(self) -> bool:
        """Whether positions are added to the tokens."""
        return hasattr(self.patch_embed, "pos_embedding")

    @property
    def noise_channels(self) -> int:
        """Channels of the noisy clip; the others of the configuration's `in_channels` are the picture's."""
        return self.config.out_channels

    @property
    def in_channels(self) -> int:
        """Channels of the latents, where ComfyUI's nodes look for them."""
        return self.noise_channels

    def condition(
        self,
        text: torch.Tensor,
        picture: torch.Tensor,
        identity: torch.Tensor | None = None,
        hidden: list[torch.Tensor] = (),
        strength: torch.Tensor | float = 1.0,
    ) -> Condition:
        """Compute what depends on the conditioning alone.

        Args:
            text: text states (B, T, D).
            picture: scaled latents of the picture in the clip's frames, (B, C, F', h, w).
            identity: (B, id width), see `FaceExtractor`.
            hidden: vision states of the face, one (B, S, width) per scale.
            strength: factor of what the face adds, a number or (B,).

        Raises:
            ValueError: learned positions do not cover a clip of this size or a text of this length.
        """
        patches = self.patches(picture)
        text_tokens = self.patch_embed.text_proj(text)
        picture_tokens = self._project_patches(patches, slice(self.noise_channels, None), with_bias=True)
        length = text.shape[1]
        if self.positioned:
            positions = self._positions(length, picture).to(text)
            text_tokens = text_tokens + positions[:, :length]
            picture_tokens = picture_tokens + positions[:, length:]
        rotary = None
        if self.config.use_rotary_positional_embeddings:
            side = self.config.patch_size
            base = (self.config.sample_height // side, self.config.sample_width // side)
            grid = (picture.shape[2], picture.shape[3] // side, picture.shape[4] // side)
            rotary = rotary_table(self.config.attention_head_dim, length, grid, base, text.device)
        return Condition(text_tokens, picture_tokens, rotary, self._project_face(identity, hidden, strength))

    def _project_face(self, identity, hidden, strength) -> torch.Tensor | None:
        """Keys and values of every face attention side by side, in the order of execution."""
        if not self.config.is_train_face:
            return None
        tokens = self.local_facial_extractor(identity, hidden)
        factor = torch.as_tensor(strength, device=tokens.device, dtype=tokens.dtype).reshape(-1, 1, 1)
        factor = factor * self.config.local_face_scale
        return torch.cat([attention.project(tokens, factor) for attention in self.perceiver_cross_attention], dim=-1)

    def _positions(self, text_length: int, clip: torch.Tensor) -> torch.Tensor:
        """Positions (1, T + N, C) to add to the tokens: those of the file, or sines where diffusers computes them."""
        config, size = self.config, tuple(clip.shape[-2:])
        if text_length != config.max_text_seq_length:
            raise ValueError(
                f"The text has {text_length} tokens, but this network has positions for {config.max_text_seq_length}."
            )
        frames = (clip.shape[2] - 1) * config.temporal_compression_ratio + 1
        trained = (config.sample_height, config.sample_width)
        if config.use_learned_positional_embeddings:
            if size != trained:
                raise ValueError(
                    f"The latent to sample is {size[1]}x{size[0]} (width x height), but this checkpoint learned its "
                    f"positions for {trained[1]}x{trained[0]} only: make clips of {trained[1] * 8}x{trained[0] * 8}."
                )
            if frames == config.sample_frames:
                return comfy.model_management.cast_to_device(self.patch_embed.pos_embedding, clip.device, clip.dtype)
        # diffusers computes them in float64, which not every device has
        positions = self.patch_embed._get_positional_embeddings(*size, frames, device="cpu")
        return positions.to(clip.dtype).to(clip.device)

    def patches(self, clip: torch.Tensor) -> torch.Tensor:
        """Patches (B, N, C * p * p) of a clip (B, C, F', h, w), frame by frame and row by row."""
        side = self.config.patch_size
        clip = clip.unflatten(4, (-1, side)).unflatten(3, (-1, side))
        return clip.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)

    def _project_patches(self, patches: torch.Tensor, channels: slice, with_bias: bool) -> torch.Tensor:
        """Tokens of patches that hold some of the input channels: the patch convolution is linear in them."""
        layer = self.patch_embed.proj
        if is_bypassed(layer):
            kernels = patches.new_zeros(patches.shape[0] * patches.shape[1] + 1, layer.in_channels, *layer.kernel_size)
            kernels[:-1, channels] = patches.view(-1, *kernels[:, channels].shape[1:])
            tokens = layer(kernels).flatten(1)
            return (tokens[:-1] if with_bias else tokens[:-1] - tokens[-1]).view(*patches.shape[:2], -1)
        weight, bias, stream = comfy.ops.cast_bias_weight(layer, patches, offloadable=True)
        tokens = linear(patches, weight[:, channels].flatten(1), bias if with_bias else None)
        comfy.ops.uncast_bias_weight(layer, weight, bias, stream)
        return tokens

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **kwargs) -> torch.Tensor:
        """Predict v of a clip.

        Args:
            x: noisy latents (B, 16, F', h, w); h and w are multiples of the patch size.
            timesteps: (B,), 0..999.
            context: text states (B, T, D); read when the condition is not computed yet.
            control, transformer_options: ComfyUI's.
            text_tokens, picture_tokens, rotary, face_keys_values: a `Condition`, the rotary table in a tuple; or
                picture, identity, vision_states, strength to compute it.
        """
        options = transformer_options or {}
        wrappers = comfy.patcher_extension.get_all_wrappers(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timesteps, context, control, options, **kwargs)

    def _forward(
        self,
        x,
        timesteps,
        context,
        control,
        transformer_options,
        text_tokens=None,
        picture_tokens=None,
        rotary=(None,),
        face_keys_values=None,
        **kwargs,
    ):
        condition = Condition(text_tokens, picture_tokens, rotary[0], face_keys_values)
        if text_tokens is None:
            face = {key: kwargs[key] for key in ("identity", "strength") if key in kwargs}
            condition = self.condition(context, kwargs["picture"], hidden=kwargs.get("vision_states", ()), **face)
        side = self.config.patch_size
        transformer_options["original_shape"] = list(x.shape)
        transformer_options["activations_shape"] = [*x.shape[:3], x.shape[3] // side, x.shape[4] // side]
        transformer_options["total_blocks"] = len(self.transformer_blocks)
        emb = self.time_embedding(self.time_proj(timesteps).to(x.dtype))
        hidden = self.run_blocks(self._tokens(x, condition), emb, condition, transformer_options)
        hidden = self.norm_final(hidden[:, condition.text.shape[1] :])
        return self._as_clip(self.proj_out(self.norm_out(hidden, temb=emb)), x.shape)

    def _tokens(self, x: torch.Tensor, condition: Condition) -> torch.Tensor:
        """Text and picture tokens (B, T + N, C) of a noisy clip.

        Raises:
            ValueError: the condition is that of another clip.
        """
        clip = self._project_patches(self.patches(x), slice(None, self.noise_channels), with_bias=False)
        if clip.shape[1] != condition.picture.shape[1]:
            raise ValueError(
                f"The face was prepared for a clip of {condition.picture.shape[1]} tokens, but {clip.shape[1]} are "
                "sampled. Use a sampler that keeps the size of the clip, and windows over frames only."
            )
        return torch.cat((condition.text.expand(clip.shape[0], -1, -1), clip + condition.picture), dim=1)

    def run_blocks(
        self, hidden: torch.Tensor, emb: torch.Tensor, condition: Condition, transformer_options: dict
    ) -> torch.Tensor:
        """All blocks over text and picture tokens (B, T + N, C) at the time embedding `emb` (B, D)."""
        length, rotary = condition.text.shape[1], condition.rotary
        rotary = rotary if rotary is None else rotary.to(hidden.device)
        faces = () if condition.face is None else condition.face.chunk(len(self.perceiver_cross_attention), dim=-1)
        transformer_options["img_slice"] = [length, hidden.shape[1]]
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        for index, block in enumerate(self.transformer_blocks):
            transformer_options["block"], transformer_options["block_index"] = ("double_block", index), index
            transformer_options["in_the_middle"] = index == len(self.transformer_blocks) // 2
            run = partial(block, text_length=length, emb=emb, rotary=rotary, transformer_options=transformer_options)
            replacement = replaced.get(("double_block", index))
            hidden = run(hidden) if replacement is None else _replaced(replacement, run, hidden, length, emb, rotary)
            turn, rest = divmod(index, self.config.cross_attn_interval)
            if faces and not rest:
                attention = self.perceiver_cross_attention[turn]
                hidden = torch.cat(
                    (
                        hidden[:, :length],
                        hidden[:, length:] + attention(hidden[:, length:], faces[turn], transformer_options),
                    ),
                    dim=1,
                )
        return hidden

    def places(self) -> dict[str, set[tuple]]:
        """Places of ComfyUI's `patches_replace` that the network has, by name."""
        blocks = {("double_block", index) for index in range(len(self.transformer_blocks))}
        return {"attn1": blocks | {("middle", 0)}, "dit": blocks}

    def _as_clip(self, tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        side = self.config.patch_size
        rows, columns = shape[3] // side, shape[4] // side
        tokens = tokens.view(shape[0], shape[2], rows, columns, -1, side, side)
        return tokens.permute(0, 4, 1, 2, 5, 3, 6).reshape(shape[0], -1, *shape[2:])


def _replaced(replacement, run, hidden: torch.Tensor, length: int, emb: torch.Tensor, rotary) -> torch.Tensor:
    """What ComfyUI's replacement of a block makes of tokens (B, T + N, C), T = `length`; it may call the block."""

    def original(args: dict) -> dict:
        tokens = run(torch.cat((args["txt"], args["img"]), dim=1))
        return {"txt": tokens[:, :length], "img": tokens[:, length:]}

    args = {"txt": hidden[:, :length], "img": hidden[:, length:], "vec": emb, "pe": rotary}
    args["transformer_options"] = run.keywords["transformer_options"]
    found = replacement(args, {"original_block": original})
    return torch.cat((found["txt"], found["img"]), dim=1)
