"""Comic pages of a story's panels: layout, gutters and captions.

The layouts are those of the StoryDiffusion demo (HVision-NKU/StoryDiffusion, utils/utils.py): two by two panels, or
rows of full and half-size panels. By default they are made for print: even white gutters, a line around each panel,
captions on all panels, no stretching, no cropping. `published` gives the demo's own pages.
"""

import logging
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..models.pictures import CHANNELS, on_paper
from .captions import SMALLEST_SIZE, draw_caption, draw_published_caption
from .font_runs import FontRow
from .lettering_fonts import BUNDLED, BUNDLED_PATH, share_out
from .page_rows import COLUMNS, Box, classic_rows, place_rows, square_rows
from .panel_numbers import select_panels
from .published_pages import published_classic, published_four_panel
from .script import Story

LAYOUTS = ("four_panel", "classic", "none")
LARGEST_SIZE = 512
# The published 45 pixels for panels of 768x768.
SIZE_SHARE, PUBLISHED_SIZE = 45 / 768, 45
# Shares of the panels' average height: 24, 32 and 3 pixels for panels of 768x768.
GUTTER_SHARE, MARGIN_SHARE, LINE_SHARE = 1 / 32, 1 / 24, 1 / 256
# Height per width of a comic book's page (6 5/8 x 10 1/4 inches); what would be higher goes onto the next page.
TALLEST = 10.25 / 6.625
PAPER, INK = (255, 255, 255), (0, 0, 0)
LANCZOS = Image.Resampling.LANCZOS


class Frame(NamedTuple):
    """What surrounds the panels of a page, in pixels."""

    width: int
    margin: int
    line: int


def make_pages(
    images: torch.Tensor | Sequence[torch.Tensor],
    captions: Sequence[str],
    layout: str = "four_panel",
    font: str = BUNDLED,
    size: int = 0,
    seed: int = 0,
    font_folders: Sequence[Path] = (),
    published: bool = False,
) -> torch.Tensor:
    """Pages of a story, as one IMAGE batch on paper of one size.

    Args:
        images: IMAGE (N, H, W, C) in 0..1, C 1 to 4; or a list of (H, W, C) or (N, H, W, C) of several sizes. What is
            transparent is white, as the paper.
        captions: one text for each panel; blank ones leave their panels as they are.
        layout, size, seed, published: see `lay_out`.
        font: one of `list_fonts(font_folders)`; for characters that it lacks see `share_out`.
        font_folders: searched for fonts besides the system's folders.

    Returns:
        (pages, H, W, 3) float32 in 0..1, on the CPU. Pages smaller than the largest lie at the middle of the paper's
        upper edge, in the layout none in the middle.

    Raises:
        ValueError: see `lay_out` and `share_out`; or images of other shapes.
    """
    for image in images:
        if image.ndim not in (3, 4) or image.shape[-1] not in CHANNELS:
            raise ValueError(
                "Expected images (height, width, channels) of 1 to 4 channels, or batches of them, but found "
                f"{tuple(image.shape)}."
            )
    batches = [image if image.ndim == 4 else image.unsqueeze(0) for image in images]
    panels = [_to_bytes(on_paper(image)) for batch in batches for image in batch]
    # Fonts have accented letters rather than letters and accents.
    texts = [unicodedata.normalize("NFC", caption) for caption in captions]
    fonts = FontRow(*share_out(font, "".join(texts), font_folders))
    pages = lay_out(panels, list(map(fonts.drawable, texts)), layout, fonts, size, seed, published)
    fitted = fit_paper(pages, centred=layout == "none")
    return torch.from_numpy(np.stack(fitted).astype(np.float32) / 255)


def captions_of(pictures: int, story: Story | None, text: str, only_panels: str = "") -> list[str]:
    """The captions of a story, or of a text with one line for each picture; none for an empty text.

    Blank lines at the end of the text do not count, and neither do blank lines between as many captions as pictures.
    Fewer pictures than the story has panels stay without captions, with a warning, unless `only_panels` says which
    panels they are.

    Args:
        only_panels: numbers of the story's panels that the pictures show, such as "2, 4-6"; empty for all.

    Raises:
        ValueError: both a story and a text, only_panels without a story, or numbers that are not as many as pictures.
    """
    if story is not None:
        if text.strip():
            raise ValueError("Both a story and captions are given. Clear captions, or disconnect the story.")
        return _story_captions(pictures, story, only_panels)
    if only_panels.strip():
        raise ValueError("only_panels are numbers of a story's panels. Connect the story, or clear only_panels.")
    lines = text.removeprefix("\ufeff").splitlines()
    if not any(line.strip() for line in lines):
        return [""] * pictures
    while len(lines) > pictures and not lines[-1].strip():
        lines.pop()
    filled = [line for line in lines if line.strip()]
    return filled if len(lines) != pictures == len(filled) else lines


def _story_captions(pictures: int, story: Story, only_panels: str) -> list[str]:
    chosen = select_panels(only_panels, len(story.panels))
    if chosen is not None:
        if len(chosen) != pictures:
            raise ValueError(
                f"only_panels is {only_panels!r}, which is {len(chosen)} panels, but there are {pictures} pictures. "
                "Write the numbers of the panels that the pictures show, as in Story Sampler."
            )
        return [story.captions[index] for index in chosen]
    if pictures < len(story.panels):
        logging.warning(
            "Comic Page: the story has %d panels, but there are %d pictures, which stay without captions. Write into "
            "only_panels which panels they show.",
            len(story.panels),
            pictures,
        )
        return [""] * pictures
    return list(story.captions)


def lay_out(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    layout: str = "four_panel",
    font: Path | FontRow = BUNDLED_PATH,
    size: int = 0,
    seed: int = 0,
    published: bool = False,
) -> list[np.ndarray]:
    """Pages of a story; their sizes may differ.

    Args:
        images: (H, W, 3) uint8, of any sizes.
        captions: one text for each panel; blank ones leave their panels as they are.
        layout: one of `LAYOUTS`. four_panel: two by two on a page. classic: rows of 4 panels, from 9 panels on of 4 and
            6 in turn, in cells of one panel or of two of about half size. none: each panel is a page, without a border.
        font: a font file that has all characters of the captions, or several files.
        size: of the letters, in pixels per em on the page, 6 to 512; captions that need it get smaller ones. 0 takes
            45/768 of the shorter side of the full-size panels, on average.
        seed: of the order of the cells in the classic layout, as published.
        published: the StoryDiffusion demo's pages, with its borders, its translucent captions of one size (0: 45), none
            on half-size panels, and its flaws.

    Returns:
        (H, W, 3) uint8 pages.

    Raises:
        ValueError: no images; another number of captions; images of another shape or type; an unknown
            layout; a size out of range; a caption that does not fit; panels too different in shape.
    """
    _check(images, captions, layout, size)
    panels = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
    fonts = FontRow((font,)) if isinstance(font, Path) else font
    if published:
        pages = _published(panels, captions, layout, fonts, size or PUBLISHED_SIZE, seed)
    else:
        pages = _printed(panels, captions, layout, fonts, size, seed)
    return [np.array(page) for page in pages]


def fit_paper(pages: Sequence[np.ndarray], centred: bool = False) -> list[np.ndarray]:
    """Pages on white paper of one size, that of the widest and of the highest; none is scaled or cut.

    Args:
        pages: (H, W, 3) uint8.
        centred: whether a lower page lies in the middle; else at the upper edge. Narrower ones lie in the middle.
    """
    height, width = (max(page.shape[axis] for page in pages) for axis in (0, 1))
    fitted = []
    for page in pages:
        paper = np.full((height, width, 3), PAPER, np.uint8)
        top, left = (height - page.shape[0]) // 2 if centred else 0, (width - page.shape[1]) // 2
        paper[top : top + page.shape[0], left : left + page.shape[1]] = page
        fitted.append(paper)
    return fitted


def _published(
    panels: Sequence[Image.Image], captions: Sequence[str], layout: str, fonts: FontRow, size: int, seed: int
) -> list[Image.Image]:
    opened = fonts.open(size)

    def letter(panel: Image.Image, index: int) -> Image.Image:
        return draw_published_caption(panel, captions[index], opened)

    if layout == "four_panel":
        return published_four_panel(panels, letter)
    if layout == "classic":
        return published_classic(panels, letter, seed)
    return [letter(panel, index) for index, panel in enumerate(panels)]


def _printed(
    panels: Sequence[Image.Image], captions: Sequence[str], layout: str, fonts: FontRow, size: int, seed: int
) -> list[Image.Image]:
    sizes = [panel.size for panel in panels]
    if layout == "none":
        pages = [[Box(index, 0, 0, *size, full=True)] for index, size in enumerate(sizes)]
        frames = [Frame(width, margin=0, line=0) for width, _ in sizes]
    else:
        height = sum(height for _, height in sizes) / len(sizes)
        gutter, margin, line = (max(1, round(share * height)) for share in (GUTTER_SHARE, MARGIN_SHARE, LINE_SHARE))
        rows = square_rows(len(panels)) if layout == "four_panel" else classic_rows(len(panels), seed)
        placed = place_rows(rows, sizes, gutter)
        frame = Frame(max(box.left + box.width for row in placed for box in row), margin, line)
        pages = _split(placed, gutter, frame.width, COLUMNS if layout == "four_panel" else None)
        frames = [frame] * len(pages)
    size = size or _automatic_size([box for page in pages for box in page])
    letter = partial(draw_caption, open_font=fonts.open, size=size)
    return [_draw_page(page, panels, captions, letter, frame) for page, frame in zip(pages, frames)]


def _split(rows: Sequence[list[Box]], gutter: int, width: int, most: int | None) -> list[list[Box]]:
    """Boxes of each page: rows one below the other, `most` of them on a page or as many as its proportions allow."""
    pages: list[list[Box]] = []
    top = count = 0
    for row in rows:
        bottom = max(box.top + box.height for box in row)
        full = top + bottom > TALLEST * width if most is None else count == most
        if not pages or full:
            pages.append([])
            top = count = 0
        pages[-1] += [box._replace(top=top + box.top) for box in row]
        top, count = top + bottom + gutter, count + 1
    return pages


def _draw_page(
    boxes: Sequence[Box],
    panels: Sequence[Image.Image],
    captions: Sequence[str],
    letter: Callable[..., Image.Image],
    frame: Frame,
) -> Image.Image:
    """White paper with the panels and a line around each, which lies in the gutter and the margin."""
    height = max(box.top + box.height for box in boxes)
    page = Image.new("RGB", (frame.width + 2 * frame.margin, height + 2 * frame.margin), PAPER)
    pen = ImageDraw.Draw(page)
    for box in boxes:
        left, top = box.left + frame.margin, box.top + frame.margin
        right, bottom = left + box.width - 1, top + box.height - 1
        line = frame.line
        pen.rectangle((left - line, top - line, right + line, bottom + line), fill=INK)
        picture = panels[box.panel]
        if picture.size != (box.width, box.height):
            picture = picture.resize((box.width, box.height), LANCZOS)
        page.paste(letter(picture, captions[box.panel], name=f"Caption {box.panel + 1}"), (left, top))
    return page


def _automatic_size(boxes: Sequence[Box]) -> int:
    """Letters' size for the full-size panels; one size for the whole story."""
    sides = [min(box.width, box.height) for box in boxes if box.full]
    return max(SMALLEST_SIZE, round(SIZE_SHARE * sum(sides) / len(sides)))


def _to_bytes(image: torch.Tensor) -> np.ndarray:
    """(H, W, C) in 0..1 as uint8."""
    return (image.detach().cpu().float().clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _check(images: Sequence[np.ndarray], captions: Sequence[str], layout: str, size: int) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"Unknown layout {layout!r}. Choose one of: {', '.join(LAYOUTS)}.")
    if size != 0 and not SMALLEST_SIZE <= size <= LARGEST_SIZE:
        raise ValueError(
            f"The letters' size is {size}. Choose 0 (automatic) or {SMALLEST_SIZE} to {LARGEST_SIZE} pixels."
        )
    if not len(images):
        raise ValueError("There are no images to put on a page. Connect at least one.")
    if len(captions) != len(images):
        raise ValueError(
            f"Found {len(images)} images but {len(captions)} captions. Give one caption for each image; an empty one "
            "leaves its image as it is."
        )
    for number, image in enumerate(images, 1):
        if image.ndim != 3 or image.shape[2] != 3 or not image.size or image.dtype != np.uint8:
            raise ValueError(
                f"Image {number} is {image.shape} {image.dtype}. Expected (height, width, 3) uint8, colours without "
                "transparency."
            )
