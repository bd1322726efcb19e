"""Nodes that make initial noise, and the sampler that makes it anew."""

from comfy_api.latest import io

from ..samplers import filters, free_init
from ..samplers import noise as initial_noise
from .sockets import checked

NOISE_CATEGORY = "ConsistentVideo/noise"
SAMPLING_CATEGORY = "ConsistentVideo/sampling"


def low_pass_inputs(kind: str) -> list:
    """The inputs that describe a `filters.LowPass`, with a default kind."""
    return [
        io.Combo.Input(
            "filter",
            options=list(filters.KINDS),
            default=kind,
            tooltip="How the low frequencies are cut out: smoothly (gaussian, butterworth) or sharply (ideal, box).",
        ),
        io.Int.Input(
            "order",
            default=4,
            min=1,
            max=100,
            tooltip="Steepness of the butterworth filter; the others ignore it.",
        ),
        io.Float.Input(
            "spatial_stop",
            default=0.25,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Up to which share of the highest frequency in the picture is kept; higher keeps finer details. "
            "0 keeps nothing.",
        ),
        io.Float.Input(
            "temporal_stop",
            default=0.25,
            min=0.0,
            max=1.0,
            step=0.01,
            tooltip="Up to which share of the highest frequency in time is kept; higher keeps faster motion. 0 keeps "
            "nothing.",
        ),
    ]


@checked
class SharedNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoSharedNoise",
            display_name="Shared Noise",
            category=NOISE_CATEGORY,
            description="Initial noise of a clip whose frames have something in common, as ConsistI2V was trained on.",
            search_aliases=["pyoco", "mixed noise", "progressive noise", "correlated noise", "video noise"],
            inputs=[
                io.Int.Input(
                    "noise_seed",
                    default=0,
                    min=0,
                    max=free_init.MAX_SEED,
                    control_after_generate=True,
                    tooltip="Seed of the noise.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(initial_noise.MODES),
                    default="independent",
                    tooltip="independent: every frame its own, as RandomNoise. mixed: one noise shared by all frames "
                    "(ConsistI2V). progressive: each frame resembles the one before.",
                ),
                io.Float.Input(
                    "alpha",
                    default=1.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    tooltip="How much is shared: 0 nothing, 1 half of the variance, more is more. The mode "
                    "independent ignores it.",
                ),
            ],
            outputs=[io.Noise.Output(tooltip="Noise for SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise_seed: int, mode: str, alpha: float) -> io.NodeOutput:
        return io.NodeOutput(initial_noise.SharedNoise(noise_seed, mode, alpha))


@checked
class FrameInitNoise(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoFrameInitNoise",
            display_name="FrameInit Noise",
            category=NOISE_CATEGORY,
            description="Initial noise that takes its low frequencies from a noised static video, which holds the "
            "layout of the first frame and steadies the clip.",
            search_aliases=["frameinit", "frame init", "consisti2v noise", "camera motion", "low frequency noise"],
            inputs=[
                io.Noise.Input("noise", tooltip="The noise to start from, such as Shared Noise or RandomNoise."),
                io.Model.Input("model", tooltip="The model that will sample: its noise levels and latent scale apply."),
                io.Latent.Input(
                    "static_video",
                    tooltip="The first frame repeated, or a moving crop of it for camera motion, of the size of the "
                    "clip. A single frame is repeated.",
                ),
                io.Int.Input(
                    "noise_level",
                    default=850,
                    min=0,
                    max=999,
                    tooltip="Training timestep to which the static video is noised: lower holds the clip closer to "
                    "it, higher leaves more freedom.",
                ),
                *low_pass_inputs("gaussian"),
            ],
            outputs=[io.Noise.Output(tooltip="Noise for SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        noise,
        model,
        static_video: dict,
        noise_level: int,
        filter: str,
        order: int,
        spatial_stop: float,
        temporal_stop: float,
    ) -> io.NodeOutput:
        low_pass = filters.LowPass(filter, order, spatial_stop, temporal_stop)
        return io.NodeOutput(initial_noise.FrameInitNoise(noise, model, static_video, noise_level, low_pass))


@checked
class FreeInitSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoFreeInitSampler",
            display_name="FreeInit Sampler",
            category=SAMPLING_CATEGORY,
            description="Denoises a clip several times, each time from noise that keeps the low frequencies of the "
            "result before: steadier clips of any video model, at a multiple of the time.",
            search_aliases=["freeinit", "free init", "temporal consistency", "flicker", "iterations"],
            inputs=[
                io.Sampler.Input("sampler", tooltip="The sampler that does each run."),
                io.Int.Input(
                    "iterations",
                    default=3,
                    min=1,
                    max=20,
                    tooltip="Number of runs; 3 to 5 are usual, 1 is plain sampling.",
                ),
                io.Boolean.Input(
                    "fast_sampling",
                    default=False,
                    tooltip="Fewer steps in the early runs: run i of N takes i / N of the steps. Faster, and a "
                    "little worse.",
                ),
                *low_pass_inputs("butterworth"),
            ],
            outputs=[io.Sampler.Output(tooltip="Sampler for SamplerCustom and SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        sampler,
        iterations: int,
        fast_sampling: bool,
        filter: str,
        order: int,
        spatial_stop: float,
        temporal_stop: float,
    ) -> io.NodeOutput:
        low_pass = filters.LowPass(filter, order, spatial_stop, temporal_stop)
        return io.NodeOutput(free_init.FreeInit(sampler, iterations, fast_sampling, low_pass))


NODES = [SharedNoise, FrameInitNoise, FreeInitSampler]
