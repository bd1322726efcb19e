"""Comic pages pixel by pixel as the StoryDiffusion demo makes them (HVision-NKU/StoryDiffusion, utils/utils.py).

Its flaws are kept: padding without a border, black paper beside it, heights cut to whole pixels, rows as wide as the
narrowest one. Measured against pages of the original code.
"""

from collections.abc import Callable, Sequence

from PIL import Image, ImageOps

from .page_rows import COLUMNS, Cell, published_rows

BORDER = 10
PADDING_COLOUR = (240, 240, 240)
LANCZOS = Image.Resampling.LANCZOS

# A panel with its border and its number in, the same with its caption out.
Letter = Callable[[Image.Image, int], Image.Image]


def published_four_panel(panels: Sequence[Image.Image], letter: Letter) -> list[Image.Image]:
    """Pages of 2x2 panels; all panels have captions.

    Args:
        panels: RGB, of any sizes.
        letter: writes a panel's caption.
    """
    cells = [letter(ImageOps.expand(panel, BORDER, "white"), index) for index, panel in enumerate(panels)]
    per_page = COLUMNS**2
    cells += [Image.new("RGB", panels[0].size, PADDING_COLOUR)] * (-len(cells) % per_page)
    rows = [_beside(cells[start : start + COLUMNS]) for start in range(0, len(cells), COLUMNS)]
    return [_stack_to_narrowest(rows[start : start + COLUMNS]) for start in range(0, len(rows), COLUMNS)]


def published_classic(panels: Sequence[Image.Image], letter: Letter, seed: int) -> list[Image.Image]:
    """One page of rows of 4, or of 4 and 6 panels; those of half size have no captions.

    Args:
        panels: RGB, of one size.
        letter: writes a panel's caption.
        seed: of the cells' order; the published code takes it from Python's global generator.

    Raises:
        ValueError: panels of several sizes.
    """
    sizes = list(dict.fromkeys(panel.size for panel in panels))
    if len(sizes) > 1:
        raise ValueError(
            f"The published classic layout needs panels of one size, but found {sizes[0]} and {sizes[1]}. Make them "
            "equal, or leave the published form out."
        )
    bordered = [ImageOps.expand(panel, BORDER, "white") for panel in panels]
    padding = Image.new("RGB", bordered[0].size, PADDING_COLOUR)

    def cell_of(cell: Cell) -> Image.Image:
        pictures = [padding if index is None else bordered[index] for index in cell]
        if len(pictures) > 1:
            column = _above(pictures)
            return column.resize((column.width // len(pictures), column.height // len(pictures)), LANCZOS)
        return pictures[0] if cell[0] is None else letter(pictures[0], cell[0])

    return [
        _stack_to_narrowest([_beside([cell_of(cell) for cell in row]) for row in published_rows(len(panels), seed)])
    ]


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures from left to right, their upper edges in line, on black."""
    row = Image.new("RGB", (sum(picture.width for picture in pictures), max(picture.height for picture in pictures)))
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width
    return row


def _above(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures from top to bottom, their left edges in line, on black."""
    column = Image.new("RGB", (max(picture.width for picture in pictures), sum(picture.height for picture in pictures)))
    top = 0
    for picture in pictures:
        column.paste(picture, (0, top))
        top += picture.height
    return column


def _stack_to_narrowest(rows: Sequence[Image.Image]) -> Image.Image:
    """Rows one above the other, each scaled to the width of the narrowest."""
    width = min(row.width for row in rows)
    return _above([row.resize((width, int(width * row.height / row.width)), LANCZOS) for row in rows])
