"""What ConsisID makes of a face: identity tokens, and the attention through which the picture looks at them."""

import comfy.model_management
import torch
from diffusers.models.transformers.consisid_transformer_3d import (
    LocalFacialExtractor,
    PerceiverAttention,
    PerceiverCrossAttention,
)

from .attention import attend


class ResamplerAttention(PerceiverAttention):
    """Queries attend to the face's features and to themselves, through ComfyUI's attention function."""

    def forward(self, image_embeds: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Attend `latents` (B, Q, D) to `image_embeds` (B, S, D) and to themselves."""
        latents = self.norm2(latents)
        keys, values = self.to_kv(torch.cat((self.norm1(image_embeds), latents), dim=1)).chunk(2, dim=-1)
        return self.to_out(attend(self.to_q(latents), keys, values, self.heads))


class FaceExtractor(LocalFacialExtractor):
    """Identity tokens of a face, computed once per run."""

    def forward(self, id_embeds: torch.Tensor, vit_hidden_states: list[torch.Tensor]) -> torch.Tensor:
        """Identity tokens (B, Q, output width).

        Args:
            id_embeds: (B, id width), ConsisID's [face recognition ; vision] embedding.
            vit_hidden_states: one (B, S, ViT width) per scale.
        """
        identity = self.id_embedding_mapping(id_embeds).unflatten(-1, (self.num_id_token, self.vit_dim))
        queries = _parameter(self.latents, id_embeds).expand(id_embeds.shape[0], -1, -1)
        tokens = torch.cat((queries, identity), dim=1)
        for scale in range(self.num_scale):
            features = getattr(self, f"mapping_{scale}")(vit_hidden_states[scale])
            features = torch.cat((identity, features), dim=1)
            for attention, feed_forward in self.layers[scale * self.depth : (scale + 1) * self.depth]:
                tokens = tokens + attention(features, tokens)
                tokens = tokens + feed_forward(tokens)
        return tokens[:, : self.num_queries] @ _parameter(self.proj_out, id_embeds)


class FaceAttention(PerceiverCrossAttention):
    """Picture tokens attend to identity tokens, whose keys and values are projected once per run."""

    def project(self, tokens: torch.Tensor, strength: float) -> torch.Tensor:
        """Keys and values of identity tokens (B, Q, D) side by side: (B, Q, 2 * heads * dim).

        The result of attention is linear in the values and its last layer has no bias: scaled values scale the result.
        """
        keys, values = self.to_kv(self.norm1(tokens)).chunk(2, dim=-1)
        return torch.cat((keys, values * strength), dim=-1)

    def forward(self, hidden: torch.Tensor, keys_values: torch.Tensor, transformer_options: dict) -> torch.Tensor:
        """What picture tokens (B, N, C) take from projected identity tokens of each clip, or of one face for all."""
        keys, values = keys_values.expand(hidden.shape[0], -1, -1).chunk(2, dim=-1)
        query = self.to_q(self.norm2(hidden))
        attended = attend(query, keys, values, self.heads, transformer_options=transformer_options)
        return self.to_out(attended)


def _parameter(parameter: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A bare parameter, which no layer brings to the device and type of the computation."""
    return comfy.model_management.cast_to_device(parameter, like.device, like.dtype)
