"""Nodes that make latents."""

from comfy_api.latest import io

from ..samplers import latents

CATEGORY = "ConsistentVideo/latent"


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoEmptyLatent",
            display_name="Empty Clip Latent",
            category=CATEGORY,
            description="An empty clip of the size that a VAE's latents have: start of text-to-video sampling.",
            search_aliases=["empty video latent", "empty latent", "t2v latent", "frames"],
            inputs=[
                io.Vae.Input(
                    "vae",
                    tooltip="The VAE that will decode the clip: its compression and channels give the latent's size.",
                ),
                io.Int.Input(
                    "width",
                    default=256,
                    min=16,
                    max=8192,
                    step=8,
                    tooltip="Width in pixels, a multiple of the VAE's compression (8).",
                ),
                io.Int.Input(
                    "height",
                    default=256,
                    min=16,
                    max=8192,
                    step=8,
                    tooltip="Height in pixels, a multiple of the VAE's compression (8).",
                ),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=1,
                    max=latents.MAX_FRAMES,
                    tooltip="Number of frames; ModelScope was trained on 16.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Number of clips sampled at once."),
            ],
            outputs=[io.Latent.Output(tooltip="Zeros (batch, channels, frames, height / 8, width / 8).")],
        )

    @classmethod
    def execute(cls, vae, width: int, height: int, frames: int, batch_size: int) -> io.NodeOutput:
        return io.NodeOutput(latents.empty_latent(vae, width, height, frames, batch_size))


NODES = [EmptyLatent]
