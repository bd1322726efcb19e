"""Nodes for ConsisID: a face and a text become a clip of that person."""

from comfy_api.latest import io

from ..faces.consisid import condition_face
from ..loaders import folders
from ..loaders.checkpoint import load_folder
from ..loaders.families import CONSISID
from ..models import consisid_conditioning
from ..patches import step_cache
from ..samplers import latents
from .loader_inputs import CATEGORY as LOADERS
from .loader_inputs import checkpoint_input, weight_dtype_input
from .sockets import checked
from .types import FACE_EMBEDS

CATEGORY = "ConsistentVideo/conditioning"


@checked
class ConsisIDLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoConsisIDLoader",
            display_name="Load ConsisID",
            category=LOADERS,
            description="Loads a ConsisID checkpoint folder: a face and a text to a clip of that person.",
            search_aliases=["consisid", "identity", "face to video", "cogvideox", "ip2v", "character video"],
            inputs=[
                checkpoint_input(CONSISID, "transformer, vae, text_encoder, tokenizer"),
                weight_dtype_input(),
            ],
            outputs=[
                io.Model.Output(tooltip="The transformer; takes what ConsisID Conditioning makes."),
                io.Clip.Output(tooltip="The T5 text encoder of the checkpoint."),
                io.Vae.Output(tooltip="The video VAE of the checkpoint; 4 frames make one latent frame."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str) -> bool | str:
        return folders.explain_missing(CONSISID, checkpoint)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, weight_dtype: str) -> str:
        return folders.fingerprint_checkpoint(checkpoint)

    @classmethod
    def execute(cls, checkpoint: str, weight_dtype: str) -> io.NodeOutput:
        return io.NodeOutput(*load_folder(CONSISID, folders.find_checkpoint(checkpoint), weight_dtype))


@checked
class ConsisIDConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoConsisIDConditioning",
            display_name="ConsisID Conditioning",
            category=CATEGORY,
            description="Adds a person's face to both prompts for ConsisID, and makes the empty clip to sample.",
            search_aliases=["consisid", "face to video", "identity preserving", "id video"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the clip shows, from the checkpoint's text encoder."),
                io.Conditioning.Input("negative", tooltip="What the clip should not show."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
                FACE_EMBEDS.Input("face", tooltip="The person, from Face Encode."),
                io.Int.Input(
                    "width", default=720, min=64, max=8192, step=16, tooltip="Width in pixels, a multiple of 16."
                ),
                io.Int.Input(
                    "height", default=480, min=64, max=8192, step=16, tooltip="Height in pixels, a multiple of 16."
                ),
                io.Int.Input(
                    "frames",
                    default=49,
                    min=1,
                    max=latents.MAX_FRAMES,
                    step=4,
                    tooltip="Number of frames, 1 more than a multiple of 4; trained on 49, at 8 per second.",
                ),
                io.Float.Input(
                    "identity_strength",
                    default=1.0,
                    min=0.0,
                    max=10.0,
                    step=0.05,
                    tooltip="How much the face's features add. 0: the aligned picture alone counts.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Number of clips."),
                io.Combo.Input(
                    "encoding",
                    options=list(consisid_conditioning.ENCODINGS),
                    default="sample",
                    optional=True,
                    advanced=True,
                    tooltip="sample: draw the picture's latent from the VAE's posterior, as published. mode: its most "
                    "likely value, without a seed.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    optional=True,
                    advanced=True,
                    tooltip="Seed of that draw.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="The positive prompt with the face."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt with the face."),
                io.Latent.Output(
                    display_name="latent", tooltip="Zeros (batch, 16, (frames - 1) / 4 + 1, height / 8, width / 8)."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        positive,
        negative,
        vae,
        face,
        width: int,
        height: int,
        frames: int,
        identity_strength: float,
        batch_size: int,
        encoding: str = "sample",
        seed: int = 0,
    ) -> io.NodeOutput:
        consisid_conditioning.check_clip(width, height, frames)
        positive, negative = condition_face(
            positive, negative, vae, face, width, height, identity_strength, encoding, seed
        )
        return io.NodeOutput(positive, negative, latents.empty_latent(vae, width, height, frames, batch_size))


@checked
class StepCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoStepCache",
            display_name="Step Cache",
            category="ConsistentVideo/patches",
            description="Faster ConsisID clips: steps in which the noise level changes little reuse what the network "
            "predicted before, after the idea of TeaCache. The clip is then not the same as that of all steps.",
            search_aliases=["teacache", "easycache", "cache", "faster", "speed", "skip steps", "consisid"],
            inputs=[
                io.Model.Input("model", tooltip="A model of Load ConsisID."),
                io.Float.Input(
                    "threshold",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Relative change of the network's input up to which a prediction is reused; more is faster "
                    "and less exact. 0: off.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the run before which every step is computed.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=0.95,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the run after which every step is computed.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the patch.")],
        )

    @classmethod
    def execute(cls, model, threshold: float, start_percent: float, end_percent: float) -> io.NodeOutput:
        return io.NodeOutput(step_cache.install_step_cache(model, threshold, start_percent, end_percent))


NODES = [ConsisIDLoader, ConsisIDConditioning, StepCache]
