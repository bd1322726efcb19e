"""Texts in several scripts: each run of characters in a font that has them, on one baseline."""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import ImageDraw, ImageFont

from .lettering_fonts import is_inked, open_font

# Variation selectors and joiners go with their character.
_SELECTORS = "[\\u200d\\ufe00-\\ufe0f]*"


class MixedFont:
    """Fonts at one size that stand in for each other, with the methods of `ImageFont.FreeTypeFont` that captions use.

    Args:
        fonts: the first one where a character is in none of the others.
        home: character -> index of its font.
    """

    def __init__(self, fonts: Sequence[ImageFont.FreeTypeFont], home: Mapping[str, int]):
        self.fonts, self.home = fonts, home

    def runs(self, text: str) -> list[tuple[str, ImageFont.FreeTypeFont]]:
        """The text in pieces, each with its font. Spaces, accents and joined characters stay with what is before."""
        runs: list[tuple[str, int]] = []
        for before, character in zip(" " + text, text):
            attached = not is_inked(character) or unicodedata.combining(character) or before == "\u200d"
            index = runs[-1][1] if runs and attached else self.home.get(character, 0)
            if runs and runs[-1][1] == index:
                runs[-1] = (runs[-1][0] + character, index)
            else:
                runs.append((character, index))
        return [(piece, self.fonts[index]) for piece, index in runs]

    def getlength(self, text: str) -> float:
        """Advance of a line in pixels."""
        return sum(font.getlength(piece) for piece, font in self.runs(text))

    def getmetrics(self) -> tuple[int, int]:
        """The largest ascent and descent of the fonts."""
        ascents, descents = zip(*(font.getmetrics() for font in self.fonts))
        return max(ascents), max(descents)

    def getbbox(self, text: str, anchor: str = "la") -> tuple[float, float, float, float]:
        """Edges of a line's ink; anchors "la" (left, ascender) and "ms" (middle, baseline)."""
        left, top = self._origin(text, anchor)
        boxes = []
        for piece, font in self.runs(text):
            box = font.getbbox(piece, anchor="ls")
            boxes.append((left + box[0], top + box[1], left + box[2], top + box[3]))
            left += font.getlength(piece)
        if not boxes:
            return (0, 0, 0, 0)
        starts, ends = [box[:2] for box in boxes], [box[2:] for box in boxes]
        return (*map(min, zip(*starts)), *map(max, zip(*ends)))

    def draw(self, pen: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str, fill) -> None:
        """Draw a line with its anchor at a place."""
        left, top = self._origin(text, anchor)
        left, top = left + place[0], top + place[1]
        for piece, font in self.runs(text):
            pen.text((left, top), piece, fill=fill, font=font, anchor="ls")
            left += font.getlength(piece)

    def _origin(self, text: str, anchor: str) -> tuple[float, float]:
        """Where the baseline begins, seen from the anchor."""
        return (-self.getlength(text) / 2, 0) if anchor == "ms" else (0, self.fonts[0].getmetrics()[0])


def text_box(pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | MixedFont) -> tuple:
    """Edges of a line whose left end and ascender are at (0, 0)."""
    return font.getbbox(text) if isinstance(font, MixedFont) else pen.textbbox((0, 0), text, font=font)


def draw_text(
    pen: ImageDraw.ImageDraw,
    place: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont | MixedFont,
    fill,
    anchor: str = "la",
) -> None:
    """Draw a line of text, as `ImageDraw.text` does with one font."""
    if isinstance(font, MixedFont):
        font.draw(pen, place, text, anchor, fill)
    else:
        pen.text(place, text, fill=fill, font=font, anchor=anchor)


@dataclass(frozen=True)
class FontRow:
    """The fonts of a story's captions.

    Args:
        paths: font files; the first one is the main one.
        home: character -> index of the font that has it; characters that are not here are in the first font.
        absent: characters that no font has.
    """

    paths: tuple[Path, ...]
    home: Mapping[str, int] = field(default_factory=dict)
    absent: frozenset[str] = frozenset()

    def open(self, size: int) -> ImageFont.FreeTypeFont | MixedFont:
        """The fonts at a size in pixels per em."""
        opened = list(map(partial(open_font, size=size), self.paths))
        return opened[0] if len(opened) == 1 else MixedFont(opened, self.home)

    def drawable(self, text: str) -> str:
        """The text without the characters that no font has."""
        if not self.absent.intersection(text):
            return text
        signs = "".join(map(re.escape, sorted(self.absent)))
        return re.sub(f"[{signs}]{_SELECTORS}", "", text)
