"""Captions of comic panels: words broken into lines, and lines drawn at the bottom of a picture.

`draw_caption` is this pack's lettering; `draw_published_caption` draws as the StoryDiffusion demo does
(HVision-NKU/StoryDiffusion, utils/utils.py).
"""

import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .font_runs import MixedFont, draw_text, text_box

# Punctuation that must not begin a line (JIS X 4051, GB/T 15834): it stays with what is before it.
NO_LINE_START = frozenset(
    "!%),.:;?]}\u00b7\u2014\u2019\u201d\u2026\u3001\u3002\u3005\u3009\u300b\u300d\u300f\u3011\u3015\u3017\u301c"
    "\u3041\u3043\u3045\u3047\u3049\u3063\u3083\u3085\u3087\u308e\u309d\u309e"
    "\u30a1\u30a3\u30a5\u30a7\u30a9\u30c3\u30e3\u30e5\u30e7\u30ee\u30fb\u30fc\u30fd\u30fe"
    "\uff01\uff05\uff09\uff0c\uff0e\uff1a\uff1b\uff1f\uff3d\uff5d\uff5e\uff60\uff61\uff63\uff64"
)
# Brackets that must not end one: they stay with what is after them.
NO_LINE_END = frozenset("([{\u2018\u201c\u3008\u300a\u300c\u300e\u3010\u3014\u3016\uff08\uff3b\uff5b\uff5f\uff62")

# The letters shrink in these steps, so that captions of one story come in few sizes.
STEPS = (1.0, 0.85, 0.7, 0.6, 0.5)
SMALLEST_SIZE = 6
# Share of a panel's height that a caption may take before its letters shrink.
USUAL_SHARE = 0.45
# In em: space around the text, around the box, the corners' radius, the outline.
PADDING, INSET, RADIUS, OUTLINE = 0.4, 0.4, 0.35, 0.06
CAP_HEIGHT = 0.7
SUPERSAMPLING = 4
BLACK, WHITE = (0, 0, 0), (255, 255, 255)

PUBLISHED_ALPHA, PUBLISHED_MARGIN, PUBLISHED_GAP = 200, 5, 20

Measure = Callable[[str], float]
Font = ImageFont.FreeTypeFont | MixedFont
OpenFont = Callable[[int], Font]


class TextBlock(NamedTuple):
    """Lines and the pixels they take, the middle of the first baseline being the origin."""

    lines: list[str]
    font: Font
    size: int
    half_width: int
    top: int
    bottom: int
    pitch: int
    broken: bool

    @property
    def margin(self) -> int:
        """From the text to the panel's edge."""
        return round(PADDING * self.size) + round(INSET * self.size)


def wrap(text: str, width: float, measure: Measure, break_words: bool = True) -> list[str]:
    """Break a text into lines, each filled as far as it goes.

    Lines break at spaces and between the characters of scripts that need none (Chinese, Japanese), but not before
    closing punctuation or after opening brackets. The text's line breaks are kept, other white space becomes one space.

    Args:
        text: the text; an empty one gives one empty line.
        width: of a line.
        measure: width of a line's text.
        break_words: whether a word wider than a line is broken between its characters; else it sticks out.

    Returns:
        Lines without white space around them. None is wider than `width`, unless it is one character or a whole word
        that is not broken.
    """
    return [line for paragraph in text.split("\n") for line in _wrap_paragraph(paragraph, width, measure, break_words)]


def draw_caption(
    panel: Image.Image, text: str, open_font: OpenFont, size: int, name: str = "The caption"
) -> Image.Image:
    """A copy of a panel with a caption in a white, rounded, outlined box at its bottom.

    The letters have the given size where the box then takes up to 45 % of the panel's height and no word is broken,
    else they shrink to as little as half. Only then may the box grow to the whole panel. The lines are about equally
    long.

    Args:
        panel: RGB.
        text: blank text draws nothing.
        open_font: gives the font at a size in pixels per em.
        size: pixels per em.
        name: what a message calls the caption.

    Raises:
        ValueError: a text that does not fit.
    """
    text = text.strip()
    if not text:
        return panel.copy()
    blocks = [_fit(panel, text, open_font, max(SMALLEST_SIZE, round(step * size))) for step in STEPS]
    usual = [block for block in blocks if _height(block) <= USUAL_SHARE * panel.height and _fits(block, panel)]
    whole = [block for block in usual if not block.broken]
    block = (whole or usual or blocks[-1:])[0]
    if not _fits(block, panel):
        raise ValueError(
            f"{name} ({len(text)} characters) does not fit into a panel of {panel.width}x{panel.height} pixels, even "
            f"with letters of {block.size} pixels. Shorten it, set a smaller size or use a layout with larger panels."
        )
    return _draw(panel, block)


def draw_published_caption(panel: Image.Image, text: str, font: Font) -> Image.Image:
    """A copy of a panel with a caption as the StoryDiffusion demo draws it: on a translucent white rectangle.

    Words that are too long and lines that are too many are cut off by the panel's edges, as published.

    Args:
        panel: RGB.
        text: an empty one draws nothing.
        font: at its size.
    """
    if text == "":
        return panel.copy()
    pen = ImageDraw.Draw(panel)
    boxes = {}

    def measure(line: str) -> float:
        boxes[line] = text_box(pen, line, font)
        return boxes[line][2] - boxes[line][0]

    lines = wrap(text, panel.width, measure, break_words=False)
    widths = [measure(line) for line in lines]
    heights = [boxes[line][3] - boxes[line][1] for line in lines]
    tops, top = [], panel.height
    for height in reversed(heights):
        top -= height + PUBLISHED_GAP
        tops.insert(0, top)
    left = (panel.width - max(widths)) // 2
    # The rectangle's lower edge follows the height of the first line: so it was published.
    box = (left, tops[0], left + max(widths), tops[-1] + heights[0])
    veil = Image.new("RGBA", panel.size)
    outer = [edge + way * PUBLISHED_MARGIN for edge, way in zip(box, (-1, -1, 1, 1))]
    ImageDraw.Draw(veil).rectangle(outer, fill=(*WHITE, PUBLISHED_ALPHA))
    # Text is blended onto an image with alpha, as published; its alpha is dropped at the end.
    captioned = Image.alpha_composite(panel.convert("RGBA"), veil)
    pen = ImageDraw.Draw(captioned)
    for line, width, top in zip(lines, widths, tops):
        draw_text(pen, ((panel.width - width) // 2, top), line, font, "black")
    return captioned.convert("RGB")


def _wrap_paragraph(text: str, width: float, measure: Measure, break_words: bool) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        gap = " "
        for piece in _pieces(word):
            joined = f"{line}{gap}{piece}" if line else piece
            if measure(joined) <= width:
                line = joined
            else:
                lines += [line] if line else []
                *broken, line = _break_piece(piece, width, measure) if break_words else [piece]
                lines += broken
            gap = ""
    return [*lines, line]


def _pieces(word: str) -> list[str]:
    """What of a word must stay on one line."""
    pieces = [word[0]]
    for before, character in zip(word, word[1:]):
        free = _ideographic(before) or _ideographic(character)
        if free and not _joined(before, character):
            pieces.append(character)
        else:
            pieces[-1] += character
    return pieces


def _joined(before: str, character: str) -> bool:
    return character in NO_LINE_START or before in NO_LINE_END or _attached(before, character)


def _attached(before: str, character: str) -> bool:
    """Whether a character is drawn on the one before it: accents, variation selectors, joined emoji."""
    return unicodedata.category(character) in ("Mn", "Mc", "Me", "Cf") or before == "\u200d"


def _ideographic(character: str) -> bool:
    """Whether lines may break beside a character. Korean is written with spaces, and breaks there."""
    wide = unicodedata.east_asian_width(character) in ("W", "F")
    return wide and not unicodedata.name(character, "").startswith("HANGUL")


def _break_piece(piece: str, width: float, measure: Measure) -> list[str]:
    """Lines of a piece; each has at least one character."""
    lines = [piece[0]]
    for before, character in zip(piece, piece[1:]):
        if _attached(before, character) or measure(lines[-1] + character) <= width:
            lines[-1] += character
        else:
            lines.append(character)
    return lines


def _fit(panel: Image.Image, text: str, open_font: OpenFont, size: int) -> TextBlock:
    """Lines for a panel's width, evened out."""
    font = open_font(size)
    width = panel.width - 2 * (round(PADDING * size) + round(INSET * size))
    lines = wrap(text, _even_width(text, width, font.getlength), font.getlength)
    boxes = [font.getbbox(line, anchor="ms") for line in lines]
    return TextBlock(
        lines,
        font,
        size,
        half_width=max(max(-round(box[0]), round(box[2])) for box in boxes),
        top=min(-round(CAP_HEIGHT * size), round(boxes[0][1])),
        bottom=max(0, round(boxes[-1][3])),
        pitch=sum(font.getmetrics()),
        broken=_widest_piece(text, font.getlength) > width,
    )


def _even_width(text: str, width: int, measure: Measure) -> int:
    """The smallest width that takes no more lines, breaks no further word and is up to the given one."""
    count = len(wrap(text, width, measure))
    widest = _widest_piece(text, measure)
    low, high = min(width, int(widest)), width
    while low < high:
        middle = (low + high) // 2
        if middle >= widest and len(wrap(text, middle, measure)) <= count:
            high = middle
        else:
            low = middle + 1
    return high


def _widest_piece(text: str, measure: Measure) -> float:
    return max(measure(piece) for word in text.split() for piece in _pieces(word))


def _height(block: TextBlock) -> int:
    """Of the text with the margins above and below it."""
    return (len(block.lines) - 1) * block.pitch + block.bottom - block.top + 2 * block.margin


def _fits(block: TextBlock, panel: Image.Image) -> bool:
    return _height(block) <= panel.height and 2 * (block.half_width + block.margin) <= panel.width


def _draw(panel: Image.Image, block: TextBlock) -> Image.Image:
    captioned = panel.copy()
    padding = round(PADDING * block.size)
    middle = panel.width // 2
    last = panel.height - block.margin - block.bottom
    first = last - (len(block.lines) - 1) * block.pitch
    box = (
        middle - block.half_width - padding,
        first + block.top - padding,
        middle + block.half_width + padding,
        last + block.bottom + padding,
    )
    outline = max(1, round(OUTLINE * block.size))
    radius = round(RADIUS * block.size)
    captioned.paste(BLACK, mask=_rounded(panel.size, box, radius))
    inner = tuple(edge - way * outline for edge, way in zip(box, (-1, -1, 1, 1)))
    captioned.paste(WHITE, mask=_rounded(panel.size, inner, max(0, radius - outline)))
    pen = ImageDraw.Draw(captioned)
    for index, line in enumerate(block.lines):
        draw_text(pen, (middle, first + index * block.pitch), line, block.font, BLACK, anchor="ms")
    return captioned


def _rounded(size: tuple[int, int], box: tuple[int, int, int, int], radius: int) -> Image.Image:
    """A smooth mask of a rounded rectangle; its right and lower edges are outside."""
    width, height = box[2] - box[0], box[3] - box[1]
    large = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
    corner = (large.width - 1, large.height - 1)
    ImageDraw.Draw(large).rounded_rectangle((0, 0, *corner), radius * SUPERSAMPLING, fill=255)
    mask = Image.new("L", size)
    mask.paste(large.resize((width, height), Image.Resampling.BOX), box[:2])
    return mask
