"""Picture styles of a story: wording around each panel's prompt, and a negative prompt.

The names are those of StoryDiffusion's list (Zhou et al. 2024, arXiv 2405.01434), so that its stories can be used as
they are; the wording is our own.
"""

import dataclasses
import difflib

PLACEHOLDER = "{prompt}"
DEFAULT_STYLE = "Japanese Anime"


@dataclasses.dataclass(frozen=True)
class Style:
    """Wording that all panels of a story share.

    Args:
        name: as listed.
        positive: text with one `{prompt}`, where the panel's prompt goes.
        negative: what the style must not look like; may be empty.

    Raises:
        ValueError: not exactly one `{prompt}`.
    """

    name: str
    positive: str
    negative: str = ""

    def __post_init__(self):
        count = self.positive.count(PLACEHOLDER)
        if count != 1:
            raise ValueError(
                f"Style {self.name!r} has {count} times {PLACEHOLDER} in {self.positive!r}. Write it once, where the "
                "panel's prompt goes."
            )

    def apply(self, prompt: str) -> str:
        """The prompt in the style's wording; braces in the prompt are plain text."""
        return self.positive.replace(PLACEHOLDER, prompt)


# No parentheses: ComfyUI reads "(words:1.3)" as a weight. The published list has such groups, but its pipeline takes
# them as plain text, so weights were never part of those styles; and a group here would swallow the rest of a template
# whose panel has an unmatched parenthesis.
# About 25 tokens each: description and panel should still fit the 77 tokens of one CLIP chunk. And no words for faces,
# which would people the panels without a character.
STYLES = {
    style.name: style
    for style in (
        Style("(No style)", PLACEHOLDER),
        Style(
            DEFAULT_STYLE,
            "anime film still of {prompt}, hand-painted background, clean ink outlines, soft cel shading, luminous "
            "colors",
            "photograph, 3d render, realistic skin, rough sketch, muddy colors, blurry, low quality, bad anatomy, "
            "malformed hands, watermark, lettering",
        ),
        Style(
            "Digital/Oil Painting",
            "richly textured oil painting of {prompt}, visible brushwork, layered glazes, warm directional light, "
            "balanced composition",
            "photograph, 3d render, flat vector shapes, thick outlines, washed out, blurry, low quality, bad anatomy, "
            "malformed hands, watermark, lettering, picture frame",
        ),
        Style(
            "Pixar/Disney Character",
            "family animation movie scene of {prompt}, rounded appealing 3d shapes, soft global illumination, "
            "rich surface detail, warm palette",
            "photograph, flat drawing, ink lines, gritty, eerie, blurry, noisy, low quality, bad anatomy, malformed "
            "hands, watermark, lettering",
        ),
        Style(
            "Photographic",
            "natural candid photo of {prompt}, 50mm lens, shallow depth of field, true-to-life texture, soft "
            "daylight, fine detail",
            "drawing, painting, cartoon, anime, 3d render, plastic skin, oversaturated, overexposed, blurry, low "
            "quality, bad anatomy, malformed hands, watermark, lettering",
        ),
        Style(
            "Comic book",
            "printed comic panel of {prompt}, bold inked contours, flat bright colors, halftone shading, dynamic pose, "
            "clear staging",
            "photograph, 3d render, realistic skin, soft focus, blurry, low quality, bad anatomy, malformed hands, "
            "watermark, speech bubble, lettering",
        ),
        Style(
            "Line art",
            "pen and ink drawing of {prompt}, even black contours on white paper, sparse hatching, uncluttered, no "
            "shading",
            "photograph, 3d render, color, gray wash, gradients, smudges, blurry, low quality, bad anatomy, malformed "
            "hands, watermark, lettering",
        ),
        Style(
            "Black and White Film Noir",
            "black and white crime movie still of {prompt}, hard low-key light, long shadows through window blinds, "
            "smoke, film grain",
            "color, sepia, cartoon, drawing, 3d render, flat light, bright cheerful scene, blurry, low quality, bad "
            "anatomy, malformed hands, watermark, lettering",
        ),
        Style(
            "Isometric Rooms",
            "isometric cutaway diorama of {prompt}, small furnished room seen from above, tidy miniature props, soft "
            "studio light, plain backdrop",
            "strong perspective, close-up portrait, fisheye, cropped room, cluttered backdrop, blurry, noisy, low "
            "quality, bad anatomy, watermark, lettering",
        ),
    )
}


def find_style(name: str) -> Style:
    """The style of a name in `STYLES`.

    Raises:
        ValueError: unknown name.
    """
    if name in STYLES:
        return STYLES[name]
    close = difflib.get_close_matches(name, STYLES, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"Unknown style {name!r}.{hint} Choose one of: {', '.join(STYLES)}.")
