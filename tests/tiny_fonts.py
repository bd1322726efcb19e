"""Font files of a few simple glyphs: a box for each character, unlike any other's, and one box for what is missing."""

from collections.abc import Sequence
from pathlib import Path

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from fontTools.ttLib.tables.TupleVariation import TupleVariation

EM, HEIGHT = 1000, 700


def build(path: Path, characters: str, blank: str = "", width: int = EM) -> Path:
    """A font with glyphs of 1 em (or `width`) for the characters, and empty ones for those of `blank`."""
    _builder(characters, blank, width).save(path)
    return path


def build_variable(path: Path, characters: str) -> Path:
    """A font with a weight axis; its bold boxes are 200 units higher than those of the default, Thin."""
    builder = _builder(characters, "", EM)
    instances = [{"location": {"wght": weight}, "stylename": name} for weight, name in ((100, "Thin"), (700, "Bold"))]
    builder.setupFvar([("wght", 100, 100, 700, "Weight")], instances)
    # Four points of a box and four phantom points.
    higher = [(0, 0), (0, 200), (0, 200), (0, 0), *[(0, 0)] * 4]
    variations = {name: [TupleVariation({"wght": (0, 1, 1)}, higher)] for name in builder.font.getGlyphOrder()}
    builder.setupGvar(variations)
    builder.save(path)
    return path


def _builder(characters: str, blank: str, width: int) -> FontBuilder:
    names = {ord(character): f"u{ord(character):04X}" for character in characters + blank}
    glyphs = {".notdef": _box(0, EM)}
    for index, character in enumerate(characters):
        glyphs[names[ord(character)]] = _box(50 + index * 5, width - 50)
    for character in blank:
        glyphs[names[ord(character)]] = TTGlyphPen(None).glyph()
    builder = FontBuilder(EM)
    builder.setupGlyphOrder(list(glyphs))
    builder.setupCharacterMap(names)
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (width, 0) for name in glyphs})
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Tiny", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    return builder


def _box(left: int, right: int, corners: Sequence[int] = (0, HEIGHT)):
    pen = TTGlyphPen(None)
    low, high = corners
    pen.moveTo((left, low))
    pen.lineTo((left, high))
    pen.lineTo((right, high))
    pen.lineTo((right, low))
    pen.closePath()
    return pen.glyph()
