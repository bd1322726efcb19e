"""Nodes that make schedules and samplers."""

from comfy_api.latest import io

from ..samplers import guidance, reference, schedules
from .sockets import checked

CATEGORY = "ConsistentVideo/sampling"


def scheduler_config(model) -> dict:
    """The scheduler configuration that a loader of this pack kept on its model.

    Raises:
        ValueError: the model comes from another loader.
    """
    config = getattr(model.model, "scheduler_config", None)
    if config is None:
        raise ValueError(
            f"This model ({type(model.model).__name__}) carries no scheduler configuration. Connect a model from a "
            "ConsistentVideo loader, "
            "or use Basic Scheduler with it."
        )
    return config


@checked
class ReferenceScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoReferenceScheduler",
            display_name="Reference Scheduler",
            category=CATEGORY,
            description="The noise levels of the checkpoint's own scheduler configuration, as the published "
            "pipeline steps through them.",
            search_aliases=["ddim scheduler", "sigmas", "diffusers schedule", "timesteps"],
            inputs=[
                io.Model.Input("model", tooltip="A model loaded by this pack."),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Number of denoising steps; the published number is 50.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the steps that is run, the last ones: below 1 for video-to-video (the "
                    "published strength is 0.6).",
                ),
            ],
            outputs=[io.Sigmas.Output(tooltip="Noise levels from high to low, ending in 0.")],
        )

    @classmethod
    def execute(cls, model, steps: int, denoise: float) -> io.NodeOutput:
        config, table = scheduler_config(model), model.get_model_object("model_sampling").sigmas
        own = len(table) == schedules.settings(config)["num_train_timesteps"]
        return io.NodeOutput(schedules.reference_sigmas(config, steps, denoise, table if own else None))


@checked
class ReferenceSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoReferenceSampler",
            display_name="Reference Sampler",
            category=CATEGORY,
            description="The published pipeline's own sampler: with Reference Scheduler it agrees with the pipeline "
            "started from the same noise.",
            search_aliases=["ddim", "ddim sampler", "eta", "diffusers sampler", "cogvideox", "dpm"],
            inputs=[
                io.Combo.Input(
                    "algorithm",
                    options=list(reference.CHOICES),
                    default="auto",
                    tooltip="auto: the algorithm that the checkpoint's scheduler configuration names, one of "
                    "CogVideoX's for ConsisID; DDIM for the other families.",
                ),
                io.Float.Input(
                    "eta",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of fresh noise in each DDIM step: 0 is deterministic, 1 is DDPM. The noise "
                    "follows the seed of the run. CogVideoX's algorithms take 0 only.",
                ),
            ],
            outputs=[io.Sampler.Output(tooltip="Sampler for SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, algorithm: str, eta: float) -> io.NodeOutput:
        return io.NodeOutput(reference.reference_sampler(algorithm, eta))


@checked
class ImageTextGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoImageTextGuider",
            display_name="Image and Text Guider",
            category=CATEGORY,
            description="Guides a clip by text and by picture, each with a strength of its own, for ConsistI2V and "
            "I2VGen-XL.",
            search_aliases=["cfg", "guidance", "image guidance", "dual cfg", "guidance rescale"],
            inputs=[
                io.Model.Input("model", tooltip="A model of Load ConsistI2V or Load I2VGen-XL."),
                io.Conditioning.Input("positive", tooltip="The positive prompt with the picture."),
                io.Conditioning.Input("negative", tooltip="The negative prompt with the picture."),
                io.Float.Input(
                    "cfg_text", default=7.5, min=0.0, max=100.0, step=0.1, tooltip="How closely to follow the text."
                ),
                io.Float.Input(
                    "cfg_image",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    tooltip="How closely to follow the picture. Above 1 a third branch, without it, is computed.",
                ),
                io.Float.Input(
                    "rescale",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Share of the contrast that strong guidance adds to take back; 0 is off.",
                ),
            ],
            outputs=[io.Guider.Output(tooltip="Guider for SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, model, positive, negative, cfg_text: float, cfg_image: float, rescale: float) -> io.NodeOutput:
        guider = guidance.ImageTextGuider(model, cfg_text, cfg_image, rescale)
        guider.set_conds(positive, negative)
        return io.NodeOutput(guider)


NODES = [ReferenceScheduler, ReferenceSampler, ImageTextGuider]
