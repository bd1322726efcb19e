"""Nodes that add what a network needs beside text to the conditioning."""

from comfy_api.latest import io

from ..models import consisti2v_conditioning, i2vgenxl_conditioning
from ..models.consisti2v_picture import MOTIONS
from ..samplers import latents
from .sockets import checked

CATEGORY = "ConsistentVideo/conditioning"


@checked
class I2VGenXLConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoI2VGenXLConditioning",
            display_name="I2VGen-XL Conditioning",
            category=CATEGORY,
            description="Adds a picture and a frame rate to both prompts for I2VGen-XL, and makes the empty clip to "
            "sample. A batch of pictures gives one clip per picture.",
            search_aliases=["i2v", "image to video", "i2vgen", "picture to video", "animate image"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the clip shows, from the checkpoint's text encoder."),
                io.Conditioning.Input("negative", tooltip="What the clip should not show."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint, or any Stable Diffusion 1.x VAE."),
                io.ClipVision.Input("clip_vision", tooltip="The vision tower of the checkpoint: OpenCLIP ViT-H/14."),
                io.Image.Input(
                    "image", tooltip="The picture to animate; cropped around its centre to the clip's shape."
                ),
                io.Int.Input(
                    "width", default=1280, min=64, max=8192, step=8, tooltip="Width in pixels, a multiple of 8."
                ),
                io.Int.Input(
                    "height", default=704, min=64, max=8192, step=8, tooltip="Height in pixels, a multiple of 8."
                ),
                io.Int.Input(
                    "frames", default=16, min=2, max=latents.MAX_FRAMES, tooltip="Number of frames; trained on 16."
                ),
                io.Int.Input(
                    "fps",
                    default=16,
                    min=1,
                    max=120,
                    tooltip="Frame rate that the motion is meant for: lower moves more.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Number of clips per picture."),
                io.Combo.Input(
                    "encoding",
                    options=list(i2vgenxl_conditioning.ENCODINGS),
                    default="sample",
                    optional=True,
                    advanced=True,
                    tooltip="How the picture becomes a latent. sample: drawn from the VAE's posterior, as published. "
                    "mode: its peak.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    optional=True,
                    advanced=True,
                    tooltip="Seed of the draw from the posterior.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="The positive prompt with picture and frame rate."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative prompt with the picture, its embedding zeroed."
                ),
                io.Latent.Output(display_name="latent", tooltip="Zeros (batch, 4, frames, height / 8, width / 8)."),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive,
        negative,
        vae,
        clip_vision,
        image,
        width: int,
        height: int,
        frames: int,
        fps: int,
        batch_size: int,
        encoding: str = "sample",
        seed: int = 0,
    ) -> io.NodeOutput:
        latent = latents.empty_latent(vae, width, height, frames, batch_size * image.shape[0])
        positive, negative = i2vgenxl_conditioning.condition_prompts(
            positive, negative, vae, clip_vision, image, width, height, fps, encoding, seed
        )
        return io.NodeOutput(positive, negative, latent)


@checked
class ConsistI2VConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoConsistI2VConditioning",
            display_name="ConsistI2V Conditioning",
            category=CATEGORY,
            description="Adds a first frame and a frame stride to both prompts for ConsistI2V, and makes the empty "
            "clip to sample. The first frame is a picture, or the last frame of another clip.",
            search_aliases=["i2v", "image to video", "first frame", "camera motion", "pan", "zoom", "long video"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the clip shows, from the checkpoint's text encoder."),
                io.Conditioning.Input("negative", tooltip="What the clip should not show."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint, or any Stable Diffusion 1.x or 2.x VAE."),
                io.Int.Input(
                    "width", default=256, min=64, max=8192, step=8, tooltip="Width in pixels, a multiple of 8."
                ),
                io.Int.Input(
                    "height", default=256, min=64, max=8192, step=8, tooltip="Height in pixels, a multiple of 8."
                ),
                io.Int.Input(
                    "frames", default=16, min=2, max=latents.MAX_FRAMES, tooltip="Number of frames; trained on 16."
                ),
                io.Int.Input(
                    "frame_stride",
                    default=3,
                    min=consisti2v_conditioning.STRIDES[0],
                    max=consisti2v_conditioning.STRIDES[1],
                    tooltip="Frames of the source video per frame of the clip: higher moves more; trained on 1 to 5.",
                ),
                io.Combo.Input(
                    "camera_motion",
                    options=list(MOTIONS),
                    default="none",
                    tooltip="A moving crop of the picture for static_video; FrameInit Noise carries it into the clip.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Number of clips per picture."),
                io.Image.Input(
                    "first_frame",
                    optional=True,
                    tooltip="The picture to start from; scaled and cut around its centre. Connect this or "
                    "first_frame_latent.",
                ),
                io.Latent.Input(
                    "first_frame_latent",
                    optional=True,
                    tooltip="One frame as a latent, from Last Frame, to continue a clip. Connect this or first_frame.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    optional=True,
                    advanced=True,
                    tooltip="Seed of the draw of the picture's latent from the VAE's posterior.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The positive prompt with the first frame."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt with the first frame."),
                io.Latent.Output(display_name="latent", tooltip="Zeros (batch, 4, frames, height / 8, width / 8)."),
                io.Latent.Output(
                    display_name="static_video",
                    tooltip="The first frame standing still or moving, for FrameInit Noise.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive,
        negative,
        vae,
        width: int,
        height: int,
        frames: int,
        frame_stride: int,
        camera_motion: str,
        batch_size: int,
        first_frame=None,
        first_frame_latent=None,
        seed: int = 0,
    ) -> io.NodeOutput:
        latents.check_size(width, height, frames, vae.spacial_compression_decode())
        static_video = consisti2v_conditioning.static_video(
            vae, first_frame, first_frame_latent, camera_motion, frames, width, height, seed
        )
        latent = latents.empty_latent(vae, width, height, frames, batch_size * static_video.shape[0])
        positive, negative = consisti2v_conditioning.condition_prompts(positive, negative, static_video, frame_stride)
        return io.NodeOutput(positive, negative, latent, {"samples": static_video})


NODES = [I2VGenXLConditioning, ConsistI2VConditioning]
