"""Nodes for picture stories: a script becomes panels with the same people."""

from comfy_api.latest import io

from ..faces.photomaker_faces import faces_for_photomaker
from ..patches.token_sharing import Sharing
from ..story import conditioning, sampling, script, styles
from ..story.plan import describe, outline
from .reports import show_text
from .sharing_inputs import rate_inputs, schedule_inputs, variant_inputs
from .sockets import checked
from .types import CHARACTER_BANK, FACE_EMBEDS, FACE_MODEL, PHOTOMAKER, STORY

CATEGORY = "ConsistentVideo/story"
LARGEST_SIDE = 4096

CHARACTERS_EXAMPLE = "a girl with short red hair and a yellow raincoat"
PANELS_EXAMPLE = (
    "waits at a bus stop in the rain #The bus is late again.\n"
    "looks at a small wooden box in her hands #What could that be?\n"
    "opens the box, light on her face\n"
    "runs across a wet street, holding the box\n"
    "[NC] an old clock on the wall, close-up #Tick. Tock.\n"
    "laughs, a small brass bird on her hand #You sing!"
)


@checked
class StoryScript(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoStoryScript",
            display_name="Story Script",
            category=CATEGORY,
            description="Reads a story: who is in it, and one line for each picture. Shows what it understood; run it "
            "alone to see that before anything is drawn.",
            search_aliases=["storydiffusion", "comic", "script", "panels", "characters", "storyboard"],
            inputs=[
                io.String.Input(
                    "characters",
                    default=CHARACTERS_EXAMPLE,
                    multiline=True,
                    tooltip="One line per character: [Name] description, or Name: description. Or one description "
                    "without a name, which then stands before every panel.",
                ),
                io.String.Input(
                    "panels",
                    default=PANELS_EXAMPLE,
                    multiline=True,
                    tooltip="One line per picture. [Name] becomes the description; [NC]: nobody is in it; the caption "
                    "follows a #. Numbers, bullets and the signs of a pasted list are left out.",
                ),
                io.Combo.Input(
                    "style",
                    options=list(styles.STYLES),
                    default=styles.DEFAULT_STYLE,
                    tooltip="Wording around every panel's prompt, and a negative prompt.",
                ),
                io.String.Input(
                    "negative",
                    default="",
                    multiline=True,
                    tooltip="What the pictures should not show, beside what the style names.",
                ),
            ],
            outputs=[STORY.Output(tooltip="The story for Story Sampler and Comic Page.")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, characters: str, panels: str, style: str, negative: str) -> io.NodeOutput:
        story = script.parse_story(characters, panels, style, negative)
        return io.NodeOutput(story, ui=show_text(cls, outline(story)))


@checked
class StoryConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoStoryConditioning",
            display_name="Story Conditioning",
            category=CATEGORY,
            description="The prompts of all panels as one batch, for KSampler with Consistent Self-Attention and an "
            "empty latent of as many pictures.",
            search_aliases=["storydiffusion", "batch prompts", "prompt list", "panels"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the checkpoint."),
                STORY.Input("story", tooltip="Of Story Script."),
                io.Int.Input(
                    "width", default=768, min=64, max=LARGEST_SIDE, step=8, tooltip="Width of the pictures in pixels."
                ),
                io.Int.Input(
                    "height", default=768, min=64, max=LARGEST_SIDE, step=8, tooltip="Height of the pictures in pixels."
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", tooltip="A batch with the prompt of every panel."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt of all."),
                io.Int.Output(display_name="panels", tooltip="Number of panels, the batch size to sample."),
            ],
        )

    @classmethod
    def execute(cls, clip, story, width: int, height: int) -> io.NodeOutput:
        conditioning.check_sides(width, height)
        prompts = [conditioning.encode_panel(clip, story, panel, width, height) for panel in story.panels]
        negative = conditioning.encode_text(clip, story.negative, width, height)
        return io.NodeOutput(conditioning.batch(prompts), negative, len(story.panels))


@checked
class StorySampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoStorySampler",
            display_name="Story Sampler",
            category=CATEGORY,
            description="Draws a story with consistent self-attention: first the reference panels of every character "
            "together, then the other panels one by one, which see those references (StoryDiffusion).",
            search_aliases=["storydiffusion", "comic", "consistent characters", "story to comic", "character bank"],
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 1.x, 2.x or XL; of Load PhotoMaker for faces."),
                io.Clip.Input("clip", tooltip="The CLIP of the checkpoint."),
                STORY.Input("story", tooltip="Of Story Script."),
                io.Sampler.Input("sampler", tooltip="Any sampler; ddim is published."),
                io.Sigmas.Input("sigmas", tooltip="Any schedule; 35 to 50 steps of ddim_uniform are published."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1, tooltip="Guidance by the prompt."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Seed of the noise, and of the choice of tokens and layers.",
                ),
                io.Int.Input("width", default=768, min=64, max=LARGEST_SIDE, step=8, tooltip="Width in pixels."),
                io.Int.Input("height", default=768, min=64, max=LARGEST_SIDE, step=8, tooltip="Height in pixels."),
                io.Int.Input(
                    "id_panels",
                    default=4,
                    min=1,
                    max=16,
                    tooltip="Reference panels per character: the first ones that show only that character.",
                ),
                *rate_inputs(),
                CHARACTER_BANK.Input(
                    "character_bank",
                    optional=True,
                    tooltip="Characters that were drawn before, with the same model, steps, size, seed and rates; they "
                    "need no reference panels.",
                ),
                io.String.Input(
                    "only_panels",
                    default="",
                    optional=True,
                    tooltip="Numbers of the panels to draw, such as 2, 4-6. Empty: all. With a character bank, panels "
                    "that were no references are drawn again as they were.",
                ),
                PHOTOMAKER.Input("photomaker", optional=True, tooltip="To draw the people in face_images."),
                io.Image.Input(
                    "face_images",
                    optional=True,
                    tooltip="Pictures for PhotoMaker: one per named character in their order, or any number of the one "
                    "character without a name. Descriptions need the word img after the person: a man img.",
                ),
                FACE_MODEL.Input("face_model", optional=True, tooltip="Finds the faces for PhotoMaker v2."),
                FACE_EMBEDS.Input(
                    "face_embeds", optional=True, tooltip="For PhotoMaker v2 in place of face_model, of one picture."
                ),
                io.Float.Input(
                    "merge_start",
                    default=0.2,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    advanced=True,
                    tooltip="Share of the steps after which PhotoMaker's person joins; before, the text alone counts.",
                ),
                *schedule_inputs(optional=True),
                *variant_inputs(),
            ],
            outputs=[
                io.Latent.Output(tooltip="All panels in the order of the story, or those of only_panels."),
                CHARACTER_BANK.Output(tooltip="What was kept of the characters, for further panels."),
                io.String.Output(display_name="plan", tooltip="What every panel is and its whole prompt."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        clip,
        story,
        sampler,
        sigmas,
        cfg: float,
        seed: int,
        width: int,
        height: int,
        id_panels: int,
        sampling_rate_32: float,
        sampling_rate_64: float,
        character_bank=None,
        only_panels: str = "",
        photomaker=None,
        face_images=None,
        face_model=None,
        face_embeds=None,
        merge_start: float = 0.2,
        start_step: int = 1,
        plain_probability_early: float = 0.3,
        plain_probability_late: float = 0.1,
        late_step: int = 20,
        step_unit: str = "steps",
        token_count: str = "fixed",
        warm_up: str = "plain",
    ) -> io.NodeOutput:
        sharing = Sharing(
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
        settings = sampling.Settings(cfg, seed, width, height, id_panels, sharing)
        identity = None
        if photomaker is not None:
            faces = faces_for_photomaker(photomaker, face_images, face_model, face_embeds)
            identity = conditioning.Identity(photomaker, face_images, *faces, merge_start)
        known = character_bank.characters if character_bank else ()
        plan = describe(story, id_panels, known)
        run = sampling.StoryRun(model, clip, story, sampler, sigmas, settings, identity)
        wanted = sampling.select_panels(only_panels, len(story.panels))
        samples, bank = run.draw(character_bank, wanted)
        return io.NodeOutput({"samples": samples}, bank, plan)


NODES = [StoryScript, StoryConditioning, StorySampler]
