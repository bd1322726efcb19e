"""Nodes that patch a MODEL."""

from comfy_api.latest import io

from ..patches import consistent_attention, context_windows, dynamic_cfg, free_u, token_sharing
from .sharing_inputs import rate_inputs, schedule_inputs, variant_inputs
from .sockets import checked
from .types import CHARACTER_BANK

CATEGORY = "ConsistentVideo/patches"


@checked
class ConsistentSelfAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoConsistentSelfAttention",
            display_name="Consistent Self-Attention",
            category=CATEGORY,
            description="The pictures of a batch see each other while they are drawn, so that people and things in "
            "them look alike (StoryDiffusion). For Stable Diffusion 1.x, 2.x and XL with any sampler.",
            search_aliases=["storydiffusion", "story", "same character", "consistent characters", "comic", "csa"],
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 1.x, 2.x or XL model; LoRA stay."),
                *rate_inputs(),
                *schedule_inputs(),
                io.Int.Input(
                    "window",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="How many pictures are drawn at a time; the windows slide over the batch and are averaged. "
                    "Memory then depends on the window only. 0: the whole batch at once.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of the choice of tokens and layers; not of the noise.",
                ),
                io.Int.Input(
                    "window_stride",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    advanced=True,
                    tooltip="By how many pictures the window moves on. 1 is published; more is faster.",
                ),
                *variant_inputs(),
                CHARACTER_BANK.Input(
                    "character_bank",
                    optional=True,
                    tooltip="Characters of a drawn story. The pictures then see them, and not each other.",
                ),
                io.String.Input(
                    "characters",
                    default="",
                    optional=True,
                    tooltip="Names of the characters of the bank that are in the pictures, with commas between them. "
                    "Empty: all of them.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the patch.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        sampling_rate_32: float,
        sampling_rate_64: float,
        start_step: int,
        plain_probability_early: float,
        plain_probability_late: float,
        late_step: int,
        window: int,
        seed: int,
        window_stride: int = 1,
        step_unit: str = "steps",
        token_count: str = "fixed",
        warm_up: str = "plain",
        character_bank=None,
        characters: str = "",
    ) -> io.NodeOutput:
        sharing = token_sharing.Sharing(
            sampling_rate_32,
            sampling_rate_64,
            start_step,
            plain_probability_early,
            plain_probability_late,
            late_step,
            seed,
            token_count,
            warm_up,
            step_unit,
        )
        names = consistent_attention.bank_names(character_bank, characters)
        model = consistent_attention.ConsistentAttention(sharing, None, character_bank, names).install(model)
        return io.NodeOutput(context_windows.slide(model, window, window_stride) if window else model)


@checked
class FreeU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoFreeU",
            display_name="FreeU by Level",
            category=CATEGORY,
            description="FreeU on the two coarsest levels of the UNet, as diffusers and StoryDiffusion apply it. "
            "ComfyUI's own FreeU chooses blocks by their channels, which are others in Stable Diffusion XL.",
            search_aliases=["freeu", "storydiffusion", "backbone", "skip", "detail"],
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 1.x, 2.x or XL model."),
                io.Float.Input(
                    "b1",
                    default=1.1,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of the coarsest level's backbone.",
                ),
                io.Float.Input(
                    "b2",
                    default=1.2,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of the next level's backbone.",
                ),
                io.Float.Input(
                    "s1",
                    default=0.6,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of the low frequencies in the coarsest level's skips.",
                ),
                io.Float.Input(
                    "s2",
                    default=0.4,
                    min=0.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Strength of the low frequencies in the next level's skips.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with FreeU.")],
        )

    @classmethod
    def execute(cls, model, b1: float, b2: float, s1: float, s2: float) -> io.NodeOutput:
        return io.NodeOutput(free_u.install_free_u(model, b1, b2, s1, s2))


@checked
class DynamicCFG(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoDynamicCFG",
            display_name="Dynamic CFG",
            category=CATEGORY,
            description="Guidance that changes over the run, as ConsisID's and CogVideoX's pipelines offer it: between "
            "1 and 1 more than the cfg of KSampler or CFG Guider. For epsilon and v-prediction models.",
            search_aliases=["consisid", "cogvideox", "guidance schedule", "cfg schedule", "use_dynamic_cfg"],
            inputs=[
                io.Model.Input("model", tooltip="A model of Load ConsisID, or another epsilon or v-prediction model."),
                io.Combo.Input(
                    "mode",
                    options=list(dynamic_cfg.MODES),
                    default="progress",
                    tooltip="progress: the guidance grows smoothly over the run. reference: the published formula, to "
                    "repeat published results; it jumps about until late in the run.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=1000,
                    tooltip="Number of steps of the run; only the mode reference needs it.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model with the patch.")],
        )

    @classmethod
    def execute(cls, model, mode: str, steps: int) -> io.NodeOutput:
        return io.NodeOutput(dynamic_cfg.install_dynamic_cfg(model, mode, steps))


NODES = [ConsistentSelfAttention, FreeU, DynamicCFG]
