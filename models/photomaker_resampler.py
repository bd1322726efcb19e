"""The identity tokens of PhotoMaker v2: a face recognition embedding, refined by what the vision tower sees.

Source: TencentARC/PhotoMaker, model_v2.py and resampler.py (the module names are those of the published weights). A
perceiver resampler as in Flamingo (arXiv 2204.14198, section 3.1.1), without the learned queries: the queries are made
from the face embedding.
"""

import torch
from torch import nn

from .attention import attend


class PerceiverAttention(nn.Module):
    """The queries attend to the picture tokens and to themselves."""

    def __init__(self, width: int, inner: int, heads: int, operations) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = operations.LayerNorm(width)
        self.norm2 = operations.LayerNorm(width)
        self.to_q = operations.Linear(width, inner, bias=False)
        self.to_kv = operations.Linear(width, 2 * inner, bias=False)
        self.to_out = operations.Linear(inner, width, bias=False)

    def forward(self, picture: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """(N, P, width) and (N, Q, width) -> (N, Q, width)."""
        picture, queries = self.norm1(picture), self.norm2(queries)
        keys, values = self.to_kv(torch.cat([picture, queries], dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(queries), keys, values, self.heads))


class Resampler(nn.Module):
    """Layers of perceiver attention and feed-forward over the queries."""

    def __init__(
        self, width: int, picture_width: int, inner: int, heads: int, feed_forward: int, depth: int, operations
    ) -> None:
        super().__init__()
        self.proj_in = operations.Linear(picture_width, width)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(width, inner, heads, operations),
                    nn.Sequential(
                        operations.LayerNorm(width),
                        operations.Linear(width, feed_forward, bias=False),
                        nn.GELU(),
                        operations.Linear(feed_forward, width, bias=False),
                    ),
                ]
            )
            for _ in range(depth)
        )
        self.proj_out = operations.Linear(width, width)
        self.norm_out = operations.LayerNorm(width)

    def forward(self, picture: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """(N, P, picture_width) and (N, Q, width) -> (N, Q, width)."""
        picture = self.proj_in(picture)
        for attention, feed_forward in self.layers:
            queries = queries + attention(picture, queries)
            queries = queries + feed_forward(queries)
        return self.norm_out(self.proj_out(queries))


class FacePerceiver(nn.Module):
    """Face embedding and picture tokens -> identity tokens.

    Args:
        width: of the identity tokens, which is that of the text embeddings (2048 for SDXL).
        tokens: identity tokens per picture (2 as published).
        face_width: of the recognition embedding (512).
        face_hidden: hidden width of its projection (2048).
        picture_width, inner, heads, feed_forward, depth: of the resampler (1024, 2048, 16, 8192, 4).
    """

    def __init__(
        self,
        width: int,
        tokens: int,
        face_width: int,
        face_hidden: int,
        picture_width: int,
        inner: int,
        heads: int,
        feed_forward: int,
        depth: int,
        operations,
    ) -> None:
        super().__init__()
        self.tokens, self.face_width = tokens, face_width
        self.token_proj = nn.Sequential(
            operations.Linear(face_width, face_hidden), nn.GELU(), operations.Linear(face_hidden, tokens * width)
        )
        self.token_norm = operations.LayerNorm(width)
        self.perceiver_resampler = Resampler(width, picture_width, inner, heads, feed_forward, depth, operations)

    def forward(self, faces: torch.Tensor, picture: torch.Tensor) -> torch.Tensor:
        """(N, face_width) and (N, P, picture_width) -> (N, tokens, width)."""
        queries = self.token_norm(self.token_proj(faces).unflatten(-1, (self.tokens, -1)))
        return queries + self.perceiver_resampler(picture, queries)
