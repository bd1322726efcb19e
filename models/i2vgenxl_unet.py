"""I2VGen-XL's network as a ComfyUI diffusion model.

Of its inputs only the noisy clip and the timestep change during a run. What the text, the picture and the frame rate
contribute is computed by `condition` once, and handed to every call.
"""

from dataclasses import dataclass

import comfy.patcher_extension
import torch
from diffusers.models.unets.unet_i2vgen_xl import I2VGenXLUNet as PublishedUNet

from .layer_pass import start_pass
from .temporal import as_clip, as_frames
from .unet3d import BlockRunner


@dataclass(frozen=True)
class Condition:
    """What does not change during a run.

    Args:
        context: tokens of the text and the picture, (B, S, D); (B, F, S, D) when each frame has an image embedding.
        keys_values: of every cross-attention, (B, S, W) or (B, F, S, W).
        picture: the encoded picture and frame positions, (B, 4, F, h, w).
        fps: the embedding of the frame rate, (B, D).
    """

    context: torch.Tensor
    keys_values: torch.Tensor
    picture: torch.Tensor
    fps: torch.Tensor


class I2VGenXLUNet(BlockRunner, PublishedUNet):
    """Picture + text to video: diffusers' `I2VGenXLUNet` called by ComfyUI."""

    def condition(
        self,
        text: torch.Tensor,
        image_latents: torch.Tensor,
        image_embeddings: torch.Tensor,
        fps: torch.Tensor,
    ) -> Condition:
        """Compute what depends on the conditioning alone.

        Args:
            text: text states (B, S, D).
            image_latents: first-frame latent and position planes, scaled, (B, 4, F, h, w).
            image_embeddings: CLIP image embeddings, (B, 1, D) for the clip or (B, F, D) for every frame.
            fps: frames per second (B,).
        """
        context = self._context(text, image_latents, image_embeddings)
        keys_values = self.project_text(context.flatten(0, 1)).unflatten(0, context.shape[:2]).squeeze(1)
        fps_embedding = self.fps_embedding(self.time_proj(fps).to(text.dtype))
        return Condition(context.squeeze(1), keys_values, self.encode_picture(image_latents), fps_embedding)

    def _context(self, text, image_latents, image_embeddings) -> torch.Tensor:
        """Text tokens, 64 tokens of the first latent, 4 tokens per image embedding: (B, 1 or F, S, D)."""
        first = self.image_latents_context_embedding(image_latents[:, :, 0]).flatten(2).transpose(1, 2)
        frames = image_embeddings.shape[1]
        tokens = self.context_embedding(image_embeddings).unflatten(2, (self.config.in_channels, -1))
        shared = torch.cat((text, first), dim=1).unsqueeze(1).expand(-1, frames, -1, -1)
        return torch.cat((shared, tokens), dim=2)

    def encode_picture(self, image_latents: torch.Tensor) -> torch.Tensor:
        """What the picture and the frames' positions (B, 4, F, h, w), scaled, add to the noisy clip's channels."""
        clips, _, frames, height, width = image_latents.shape
        encoded = as_clip(self.image_latents_proj_in(as_frames(image_latents)), frames)
        pixels = encoded.permute(0, 3, 4, 2, 1).reshape(clips * height * width, frames, -1)
        pixels = self.image_latents_temporal_encoder(pixels)
        return pixels.view(clips, height, width, frames, -1).permute(0, 4, 3, 1, 2)

    def forward(self, x, timesteps, context=None, control=None, transformer_options=None, **kwargs) -> torch.Tensor:
        """Predict v of a clip.

        Args:
            x: noisy latents (B, 4, F, h, w).
            timesteps: (B,), 0..999.
            context: text states (B, S, D); read when the condition is not computed yet.
            control, transformer_options: ComfyUI's.
            context_tokens, keys_values, picture, fps_embedding: a `Condition`; or image_latents, image_embeddings, fps
                to compute it.
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
        context_tokens=None,
        keys_values=None,
        picture=None,
        fps_embedding=None,
        **kwargs,
    ):
        if keys_values is None:
            condition = self.condition(context, kwargs["image_latents"], kwargs["image_embeddings"], kwargs["fps"])
            keys_values, picture, fps_embedding = condition.keys_values, condition.picture, condition.fps
            context_tokens = condition.context
        frames = x.shape[2]
        start_pass(x, transformer_options)
        emb = self.embed_time(timesteps, x, transformer_options) + fps_embedding
        hidden = self.conv_in(as_frames(torch.cat((x, picture), dim=1)))
        hidden = self.transformer_in(hidden, frames, transformer_options)
        if keys_values.ndim == 4:
            keys_values = keys_values.flatten(0, 1)
            context_tokens = None if context_tokens is None else context_tokens.flatten(0, 1)
        layers = self.start_layers(emb, keys_values, frames, transformer_options, context_tokens, control)
        hidden = self.run_blocks(hidden, layers, x, timesteps)
        hidden = self.conv_out(self.conv_act(self.conv_norm_out(hidden)))
        return as_clip(hidden, frames)
