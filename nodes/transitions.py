"""Nodes for the clips between the panels of a story."""

from comfy_api.latest import io

from ..loaders import motion_predictor as files
from ..models import i2vgenxl_conditioning, transition_conditioning
from ..samplers import latents
from ..story import transitions
from .sockets import checked
from .types import MOTION_PREDICTOR, STORY

CATEGORY = "ConsistentVideo/transitions"


@checked
class MotionPredictorLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoMotionPredictorLoader",
            display_name="Load Motion Predictor",
            category=CATEGORY,
            description="Loads a semantic motion predictor: what leads from one picture to another, frame by frame.",
            search_aliases=["storydiffusion", "semantic motion predictor", "transition", "in-between"],
            inputs=[
                io.Combo.Input(
                    "file",
                    options=files.FILES.names(),
                    tooltip=f"A file in models/{files.FOLDER}, which this pack's trainer wrote.",
                )
            ],
            outputs=[MOTION_PREDICTOR.Output(tooltip="For Transition Conditioning.")],
        )

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return files.FILES.check(file)

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return files.FILES.fingerprint(file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return io.NodeOutput(files.load_motion_predictor(files.FILES.find(file)))


@checked
class TransitionConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoTransitionConditioning",
            display_name="Transition Conditioning",
            category=CATEGORY,
            description="Adds two pictures and a frame rate to both prompts for I2VGen-XL, and makes the empty clip to "
            "sample, which leads from the first picture to the second. Batches of pictures give one clip per pair.",
            search_aliases=["storydiffusion", "transition", "in-between", "interpolate", "start and end frame"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the clip shows, from the checkpoint's text encoder."),
                io.Conditioning.Input("negative", tooltip="What the clip should not show."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint, or any Stable Diffusion 1.x VAE."),
                io.ClipVision.Input("clip_vision", tooltip="The vision tower of the checkpoint: OpenCLIP ViT-H/14."),
                io.Image.Input(
                    "start_image", tooltip="The picture to begin with; cropped around its centre to the clip's shape."
                ),
                io.Image.Input("end_image", tooltip="The picture to end with; its content, not its pixels, is met."),
                io.Int.Input(
                    "width", default=512, min=64, max=8192, step=8, tooltip="Width in pixels, a multiple of 8."
                ),
                io.Int.Input(
                    "height", default=512, min=64, max=8192, step=8, tooltip="Height in pixels, a multiple of 8."
                ),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=2,
                    max=latents.MAX_FRAMES,
                    tooltip="Number of frames, at most what the motion predictor was made for, usually 32; I2VGen-XL "
                    "was trained on 16.",
                ),
                io.Int.Input(
                    "fps",
                    default=8,
                    min=1,
                    max=120,
                    tooltip="Frame rate that the motion is meant for: lower moves more.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Number of clips per pair of pictures."),
                MOTION_PREDICTOR.Input(
                    "motion_predictor",
                    optional=True,
                    tooltip="Of Load Motion Predictor. Without it the frames' image embeddings are interpolated "
                    "linearly.",
                ),
                io.Combo.Input(
                    "encoding",
                    options=list(i2vgenxl_conditioning.ENCODINGS),
                    default="sample",
                    optional=True,
                    advanced=True,
                    tooltip="How the start picture becomes a latent. sample: drawn from the VAE's posterior, as "
                    "published for I2VGen-XL. mode: its peak.",
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
                    display_name="positive",
                    tooltip="The positive prompt with the start picture, an embedding per frame and the frame rate.",
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="The negative prompt with the start picture, embeddings zeroed."
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
        start_image,
        end_image,
        width: int,
        height: int,
        frames: int,
        fps: int,
        batch_size: int,
        motion_predictor=None,
        encoding: str = "sample",
        seed: int = 0,
    ) -> io.NodeOutput:
        clips = batch_size * transition_conditioning.count_pairs(start_image, end_image)
        latent = latents.empty_latent(vae, width, height, frames, clips)
        positive, negative = transition_conditioning.condition_transition(
            positive,
            negative,
            vae,
            clip_vision,
            motion_predictor,
            start_image,
            end_image,
            width,
            height,
            frames,
            fps,
            encoding,
            seed,
        )
        return io.NodeOutput(positive, negative, latent)


@checked
class StoryTransitions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoStoryTransitions",
            display_name="Story Transitions",
            category=CATEGORY,
            description="Pairs every panel with the next one. The nodes behind it run once per pair, one after the "
            "other; Join Transitions makes one video of their clips.",
            search_aliases=["storydiffusion", "story to video", "transition", "panels", "pairs"],
            inputs=[
                io.Image.Input("images", tooltip="The panels of the story as one batch, at least 2, in their order."),
                STORY.Input(
                    "story",
                    optional=True,
                    tooltip="Of Story Script: what its panels show becomes the prompts. Without it prompts are empty.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="start_images",
                    is_output_list=True,
                    tooltip="A list: the picture that each transition begins with.",
                ),
                io.Image.Output(
                    display_name="end_images",
                    is_output_list=True,
                    tooltip="A list: the picture that each transition ends with.",
                ),
                io.String.Output(
                    display_name="prompts",
                    is_output_list=True,
                    tooltip="A list: the prompts of both panels in the style's wording, without PhotoMaker's img.",
                ),
            ],
        )

    @classmethod
    def execute(cls, images, story=None) -> io.NodeOutput:
        starts, ends = transitions.neighbours(images)
        return io.NodeOutput(starts, ends, transitions.prompts(len(images), story))


@checked
class JoinTransitions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoJoinTransitions",
            display_name="Join Transitions",
            category=CATEGORY,
            description="The clips of Story Transitions one after the other, each without its last frame but the last "
            "one, because the next clip begins with that panel.",
            search_aliases=["storydiffusion", "story to video", "concatenate clips", "append video", "long video"],
            is_input_list=True,
            inputs=[io.Image.Input("images", tooltip="The decoded clips, one per pair of panels, of the same size.")],
            outputs=[io.Image.Output(tooltip="All frames of one video.")],
        )

    @classmethod
    def execute(cls, images) -> io.NodeOutput:
        return io.NodeOutput(transitions.join(images))


NODES = [MotionPredictorLoader, TransitionConditioning, StoryTransitions, JoinTransitions]
