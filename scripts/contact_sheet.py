"""One picture that shows what the example workflows made: a row of frames for each. Needs Pillow and PyAV."""

from dataclasses import dataclass, field
from pathlib import Path

import av
from PIL import Image, ImageDraw, ImageFont, ImageSequence

VIDEOS = (".mp4", ".webm", ".mkv", ".mov")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
COLUMNS = 8
CELL = 160  # longer side of a frame, pixels
GAP = 8
LABEL = 28  # height of a row's title
TEXT_LINES = 8
BACKGROUND, INK = "#16181d", "#e8e8e8"


@dataclass
class Row:
    """A title, the files to show frames of, and text for a workflow that makes no picture."""

    title: str
    files: list[Path] = field(default_factory=list)
    text: str = ""


def frames_of(path: Path) -> list[Image.Image]:
    """All frames of a clip or picture as RGB; empty for other files."""
    suffix = path.suffix.lower()
    if suffix in VIDEOS:
        with av.open(str(path)) as container:
            return [frame.to_image() for frame in container.decode(video=0)]
    if suffix in PICTURES:
        with Image.open(path) as picture:
            return [frame.convert("RGB") for frame in ImageSequence.Iterator(picture)]
    return []


def spread(items: list, count: int) -> list:
    """At most `count` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return items
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def contact_sheet(rows: list[Row]) -> Image.Image:
    """RGB picture with one row per workflow: its title, then up to 8 frames of its clips or the start of its text."""
    strips = [_strip(row) for row in rows]
    width = COLUMNS * (CELL + GAP) + GAP
    sheet = Image.new("RGB", (width, sum(LABEL + GAP + strip.height for strip in strips) + GAP), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = GAP
    for row, strip in zip(rows, strips):
        draw.text((GAP, top), row.title, fill=INK, font=ImageFont.load_default(16))
        sheet.paste(strip, (0, top + LABEL))
        top += LABEL + strip.height + GAP
    return sheet


def _strip(row: Row) -> Image.Image:
    frames = spread([frame for path in row.files for frame in frames_of(path)], COLUMNS)
    for frame in frames:
        frame.thumbnail((CELL, CELL))
    lines = [] if frames else row.text.splitlines()[:TEXT_LINES]
    height = max([frame.height for frame in frames] + [16 * len(lines), 16])
    strip = Image.new("RGB", (COLUMNS * (CELL + GAP) + GAP, height), BACKGROUND)
    for index, frame in enumerate(frames):
        strip.paste(frame, (GAP + index * (CELL + GAP), 0))
    draw = ImageDraw.Draw(strip)
    for index, line in enumerate(lines):
        draw.text((GAP, 16 * index), line[:160], fill=INK, font=ImageFont.load_default(12))
    return strip
