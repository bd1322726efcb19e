"""Nodes that make latents."""

from comfy_api.latest import io

from ..samplers import latents
from .sockets import checked

CATEGORY = "ConsistentVideo/latent"


@checked
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


@checked
class LastFrame(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoLastFrame",
            display_name="Last Frame",
            category=CATEGORY,
            description="The last frame of a clip as a latent of one frame: the start of a long video's next chunk.",
            search_aliases=["long video", "continue clip", "extend video", "chunk"],
            inputs=[io.Latent.Input("latent", tooltip="A clip (batch, channels, frames, height, width).")],
            outputs=[io.Latent.Output(tooltip="Its last frame (batch, channels, 1, height, width).")],
        )

    @classmethod
    def execute(cls, latent: dict) -> io.NodeOutput:
        return io.NodeOutput(latents.last_frame(latent))


@checked
class JoinClips(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoJoinClips",
            display_name="Join Clips",
            category=CATEGORY,
            description="Two clips one after the other, without the first frame of the second, which repeats the last "
            "frame of the first.",
            search_aliases=["long video", "concatenate clips", "append video", "chunk"],
            inputs=[
                io.Latent.Input("first", tooltip="The clip that comes first."),
                io.Latent.Input("second", tooltip="The clip that continues it, of the same size and batch."),
            ],
            outputs=[io.Latent.Output(tooltip="One clip of all frames but the repeated one.")],
        )

    @classmethod
    def execute(cls, first: dict, second: dict) -> io.NodeOutput:
        return io.NodeOutput(latents.join_clips(first, second))


NODES = [EmptyLatent, LastFrame, JoinClips]
