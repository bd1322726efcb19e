"""The node that makes comic pages."""

from comfy_api.latest import io

from ..loaders import fonts
from ..story import lettering_fonts, pages
from .sockets import checked
from .types import STORY

CATEGORY = "ConsistentVideo/story"


@checked
class ComicPage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ConsistentVideoComicPage",
            display_name="Comic Page",
            category=CATEGORY,
            description="Puts the pictures of a story on comic pages, with their captions.",
            search_aliases=["comic", "storydiffusion", "panels", "page layout", "captions", "speech", "storyboard"],
            inputs=[
                io.Image.Input("images", tooltip="The panels in order."),
                io.Combo.Input(
                    "layout",
                    options=list(pages.LAYOUTS),
                    default="four_panel",
                    tooltip="four_panel: two by two. classic: rows of large and small panels. none: captions only.",
                ),
                io.Combo.Input(
                    "font",
                    options=list(lettering_fonts.list_fonts(fonts.folders())),
                    default=lettering_fonts.BUNDLED,
                    tooltip="Of the captions. When it lacks a character, such as Chinese, another font that has all of "
                    "them is taken, or several together. Put fonts into models/fonts or install them.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=pages.LARGEST_SIZE,
                    tooltip="Height of the letters in pixels; 0 goes by the size of the panels.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of the arrangement of the classic layout.",
                ),
                STORY.Input("story", optional=True, tooltip="Whose captions to write. Connect this, or fill captions."),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="One line per picture when no story is connected; none at all leaves the pictures blank.",
                ),
                io.Boolean.Input(
                    "published_look",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="The pages of the published demo, with its borders and translucent captions.",
                ),
                io.String.Input(
                    "only_panels",
                    default="",
                    optional=True,
                    tooltip="Numbers of the story's panels that the pictures show, such as 2, 4-6, when Story Sampler "
                    "drew only those. Empty: all.",
                ),
            ],
            outputs=[io.Image.Output(display_name="pages", tooltip="The pages, all of one size.")],
        )

    @classmethod
    def execute(
        cls,
        images,
        layout: str,
        font: str,
        size: int,
        seed: int,
        story=None,
        captions: str = "",
        published_look: bool = False,
        only_panels: str = "",
    ) -> io.NodeOutput:
        texts = pages.captions_of(len(images), story, captions, only_panels)
        made = pages.make_pages(images, texts, layout, font, size, seed, fonts.folders(), published_look)
        return io.NodeOutput(made)


NODES = [ComicPage]
