"""The semantic motion predictor of StoryDiffusion: two key frames -> an image embedding for every frame between them.

Zhou et al. 2024, arXiv 2405.01434, section 3.2, the paper alone: neither code nor weights were published. Stated there:
both frames are encoded by CLIP, interpolated linearly to the length of the clip, and changed by 8 transformer blocks
of width 1024 with 12 heads. Where it is silent this module decides, and says so.
"""

import comfy.model_management
import comfy.model_patcher
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import IPAdapterPlusImageProjection, get_timestep_embedding
from torch import nn

from .transformer import OptimizedAttention

# Smallest and largest value of a setting, so that a damaged file cannot ask for a network that never ends to build.
SIZES = (1, 65536)
LIMITS = {
    "image_tokens": (0, 1024),
    "hidden_size": (4, 65536),
    "num_layers": (1, 256),
    "image_token_layers": (1, 256),
    "feed_forward_multiplier": (1, 64),
    "max_frames": (2, 4096),
}


def linear_interpolation(start: torch.Tensor, end: torch.Tensor, frames: int) -> torch.Tensor:
    """Frame i of L is (1 - w) start + w end with w = i / (L - 1).

    The first and the last are `start` and `end` bit by bit, and equal ones stay what they are.

    Args:
        start, end: (B, ..., D) of one shape and type.
        frames: L, at least 2.

    Returns:
        (B, L, ..., D).

    Raises:
        ValueError: fewer than 2 frames.
    """
    if frames < 2:
        raise ValueError(f"frames is {frames}. A transition has at least 2 frames: its start and its end.")
    weights = torch.arange(frames, device=start.device, dtype=torch.float32) / (frames - 1)
    weights = weights.to(start.dtype).view(-1, *(1 for _ in start.shape[1:]))
    return torch.lerp(start.unsqueeze(1), end.unsqueeze(1), weights)


class ContextAttention(OptimizedAttention):
    """Attention to another sequence, as diffusers' modules call it."""

    def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Attend `hidden` (N, L, C) to `context` (N, S, D)."""
        return super().forward(hidden, (self.to_k(context), self.to_v(context)))


class ImageTokens(IPAdapterPlusImageProjection):
    """A picture's tokens of the vision tower, pooled to a few by learned queries: the resampler of IP-Adapter Plus."""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        for layer in self.layers:
            layer.attn.__class__ = ContextAttention

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, S, vision width) -> (N, queries, width)."""
        queries = _parameter(self.latents, hidden).expand(hidden.shape[0], -1, -1)
        picture = self.proj_in(hidden)
        for layer in self.layers:
            queries = layer(picture, queries, queries)
        return self.norm_out(self.proj_out(queries))


class PredictorBlock(nn.Module):
    """Pre-norm self-attention and GELU feed-forward over the tokens of all frames."""

    def __init__(self, width: int, heads: int, head_dim: int, feed_forward: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = OptimizedAttention(width, heads=heads, dim_head=head_dim, out_bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.ff = FeedForward(width, mult=feed_forward, activation_fn="gelu")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, T, width) -> (B, T, width)."""
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.ff(self.norm2(tokens))


class MotionPredictor(nn.Module):
    """Changes the linear interpolation of two image embeddings, frame by frame, by what a transformer predicts.

    A frame is one token made from its interpolated embedding and `image_tokens` interpolated picture tokens, which keep
    what the embedding alone loses (where things are); their number is not in the paper. All tokens of all frames attend
    to each other. The changed embedding is read from the frame's first token.

    The last layer is zero, and nothing else: an untrained network is exactly linear interpolation. Were the output
    layers of the blocks zero too, the change would start just as zero, but those layers would learn from the second
    step and what feeds them from the third; so the last layer learns in the first step and everything from the second.

    The first and the last frame keep the embeddings of the key frames: those are known, so there is nothing to predict.
    The paper predicts all frames and does not say that its ends are exact; this is our reading.

    Args:
        embedding_dim: of the tower's projected embedding, which is the width of I2VGen-XL's image context.
        vision_dim: of the tower's tokens.
        image_tokens: pooled per picture; 0 takes the embedding alone.
        hidden_size, num_layers, num_attention_heads, attention_head_dim, feed_forward_multiplier: of the transformer.
            1024 is no multiple of 12 heads, so the heads have a width of their own (64), as in IP-Adapter.
        max_frames: longest clip, that of training.
        image_token_layers: of the network that pools the tokens, which has the transformer's widths.

    Raises:
        ValueError: a setting is no whole number within its limits.
    """

    def __init__(
        self,
        embedding_dim: int = 1024,
        vision_dim: int = 1280,
        image_tokens: int = 16,
        hidden_size: int = 1024,
        num_layers: int = 8,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        feed_forward_multiplier: int = 4,
        max_frames: int = 32,
        image_token_layers: int = 4,
    ) -> None:
        super().__init__()
        self.config = {
            "embedding_dim": embedding_dim,
            "vision_dim": vision_dim,
            "image_tokens": image_tokens,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "num_attention_heads": num_attention_heads,
            "attention_head_dim": attention_head_dim,
            "feed_forward_multiplier": feed_forward_multiplier,
            "max_frames": max_frames,
            "image_token_layers": image_token_layers,
        }
        _check_config(self.config)
        self.embedding_in = nn.Linear(embedding_dim, hidden_size)
        self.image_tokens = None
        if image_tokens:
            self.image_tokens = ImageTokens(
                embed_dims=vision_dim,
                output_dims=hidden_size,
                hidden_dims=hidden_size,
                depth=image_token_layers,
                dim_head=attention_head_dim,
                heads=num_attention_heads,
                num_queries=image_tokens,
                ffn_ratio=feed_forward_multiplier,
            )
        self.token_positions = nn.Parameter(0.02 * torch.randn(1 + image_tokens, hidden_size))
        self.blocks = nn.ModuleList(
            PredictorBlock(hidden_size, num_attention_heads, attention_head_dim, feed_forward_multiplier)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(hidden_size)
        self.embedding_out = nn.Linear(hidden_size, embedding_dim)
        nn.init.zeros_(self.embedding_out.weight)
        nn.init.zeros_(self.embedding_out.bias)

    def forward(
        self,
        start_embedding: torch.Tensor,
        end_embedding: torch.Tensor,
        start_tokens: torch.Tensor | None,
        end_tokens: torch.Tensor | None,
        frames: int,
    ) -> torch.Tensor:
        """The image embedding of every frame.

        Args:
            start_embedding, end_embedding: (B, embedding_dim), projected by the vision tower.
            start_tokens, end_tokens: (B, S, vision_dim), the tower's penultimate hidden states; not read without
                `image_tokens`.
            frames: 2..max_frames.

        Returns:
            (B, frames, embedding_dim).

        Raises:
            ValueError: tensors of other shapes, or a number of frames out of range.
        """
        self._check(start_embedding, end_embedding, start_tokens, end_tokens, frames)
        interpolated = linear_interpolation(start_embedding, end_embedding, frames)
        tokens = self.embedding_in(interpolated).unsqueeze(2)
        if self.image_tokens is not None:
            pooled = self.image_tokens(torch.cat((start_tokens, end_tokens)))
            tokens = torch.cat((tokens, linear_interpolation(*pooled.chunk(2), frames)), dim=2)
        positions = frame_positions(frames, tokens).unsqueeze(1) + _parameter(self.token_positions, tokens)
        tokens = (tokens + positions).flatten(1, 2)
        for block in self.blocks:
            tokens = block(tokens)
        between = tokens.unflatten(1, (frames, -1))[:, 1:-1, 0]
        change = self.embedding_out(self.norm_out(between))
        return interpolated + nn.functional.pad(change, (0, 0, 1, 1))

    def check_frames(self, frames: int) -> None:
        """Raise ValueError for a clip that is too short or too long for this network."""
        longest = self.config["max_frames"]
        if not 2 <= frames <= longest:
            raise ValueError(
                f"frames is {frames}, but this motion predictor makes 2 to {longest}. Choose such a number; longer "
                "videos are made of several transitions."
            )

    def _check(self, start, end, start_tokens, end_tokens, frames: int) -> None:
        self.check_frames(frames)
        width, vision = self.config["embedding_dim"], self.config["vision_dim"]
        if start.ndim != 2 or start.shape != end.shape or start.shape[-1] != width:
            raise ValueError(
                f"The key frames' embeddings are {tuple(start.shape)} and {tuple(end.shape)}, but this motion "
                f"predictor needs two of (batch, {width}). Use the vision tower that it was trained with."
            )
        if self.image_tokens is None:
            return
        shapes = [None if tokens is None else tuple(tokens.shape) for tokens in (start_tokens, end_tokens)]
        if None in shapes or shapes[0] != shapes[1] or (len(shapes[0]), shapes[0][0]) != (3, start.shape[0]):
            raise ValueError(
                f"The key frames' tokens are {shapes[0]} and {shapes[1]}, but this motion predictor needs two of "
                f"({start.shape[0]}, tokens, {vision}). Give the penultimate hidden states of both pictures."
            )
        if shapes[0][-1] != vision:
            raise ValueError(
                f"The vision tower's tokens have {shapes[0][-1]} values, but this motion predictor needs {vision}. Use "
                "the vision tower that it was trained with."
            )


class MotionPredictorModel:
    """Value of the MOTION_PREDICTOR socket: a network in ComfyUI's memory management.

    Args:
        patcher: holds a `MotionPredictor`.
    """

    def __init__(self, patcher: comfy.model_patcher.ModelPatcher) -> None:
        self.patcher = patcher
        self.load_device = patcher.load_device
        self.config = patcher.model.config

    def check_frames(self, frames: int) -> None:
        """As of `MotionPredictor.check_frames`."""
        self.patcher.model.check_frames(frames)

    def predict(
        self,
        start_embedding: torch.Tensor,
        end_embedding: torch.Tensor,
        start_tokens: torch.Tensor | None,
        end_tokens: torch.Tensor | None,
        frames: int,
    ) -> torch.Tensor:
        """As of `MotionPredictor.forward`, from any device, in float32, to ComfyUI's device of intermediate values.

        Raises:
            ValueError: as of `MotionPredictor.forward`.
        """
        comfy.model_management.load_models_gpu([self.patcher])
        inputs = (
            None if tensor is None else tensor.to(self.load_device, torch.float32)
            for tensor in (start_embedding, end_embedding, start_tokens, end_tokens)
        )
        return self.patcher.model(*inputs, frames).to(comfy.model_management.intermediate_device())


def frame_positions(frames: int, like: torch.Tensor) -> torch.Tensor:
    """Sines, then cosines of the frames' numbers (frames, width): the positions of arXiv 1706.03762, section 3.5."""
    numbers = torch.arange(frames, device=like.device)
    return get_timestep_embedding(numbers, like.shape[-1], downscale_freq_shift=0).to(like.dtype)


def _check_config(config: dict) -> None:
    for name, value in config.items():
        smallest, largest = LIMITS.get(name, SIZES)
        if type(value) is not int or not smallest <= value <= largest:
            raise ValueError(f"{name} is {value!r}, expected a whole number from {smallest} to {largest}")


def _parameter(parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A bare parameter, which no layer brings to the device and type of the computation."""
    return comfy.model_management.cast_to_device(parameter, like.device, like.dtype)
