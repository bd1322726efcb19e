"""Which panel goes where on a comic page: groups of panels, the cells of a row, and rectangles.

Group sizes, cell widths and their shuffling are those of the StoryDiffusion demo (HVision-NKU/StoryDiffusion,
utils/utils.py). Sizes and places are this pack's: the panels of a row keep their shapes and fill the row exactly.
"""

import random
from collections.abc import Sequence
from typing import NamedTuple

# Panels of the rows, in turn. Up to 8 panels make rows of 4 only.
FEW, FEW_PANELS = (4,), 8
MANY = (4, 6)
# Panels of each cell of a row: 1 is a full cell, 2 a cell of two panels, one above the other.
CELLS = {4: (1, 1, 2), 6: (1, 1, 2, 2)}
# Rows of a story's end. They are no higher than a row of 4, so that their panels are not larger than the others.
SHORT_CELLS = {1: (1, 1, 2), 2: (1, 1, 2), 3: (1, 1, 1), 5: (1, 1, 1, 2)}
LONE = (1, 2)
COLUMNS = 2
SMALLEST_PANEL = 4

Cell = tuple[int | None, ...]
Row = list[Cell]
Shape = list[tuple[float, ...]]


class Box(NamedTuple):
    """Where a panel is on its page, in pixels."""

    panel: int
    left: int
    top: int
    width: int
    height: int
    full: bool


def square_rows(count: int) -> list[Row]:
    """Rows of two full cells. Panels are numbered from 0; with an odd number of them the last cell is None, empty."""
    if count == 1:
        return [[(0,)]]
    cells = [(index if index < count else None,) for index in range(count + count % COLUMNS)]
    return [cells[start : start + COLUMNS] for start in range(0, len(cells), COLUMNS)]


def published_rows(count: int, seed: int) -> list[Row]:
    """Rows of full cells and of cells of two panels in a shuffled order; the last row is filled up with None."""
    shuffler = random.Random(seed)
    rows, start = [], 0
    for size in _row_sizes(count):
        rows.append(_row(_shuffled(CELLS[size], shuffler), start, count))
        start += size
    return rows


def classic_rows(count: int, seed: int) -> list[Row]:
    """As `published_rows`, but a last row with too few panels is arranged for those that it has.

    Full rows have the published order. One or two panels that are left take the first cells of a row of four, whose
    others stay empty; a story of one or two panels is a row of full cells.
    """
    if count in LONE:
        return [[(index,) for index in range(count)]]
    shuffler = random.Random(seed)
    rows, start = [], 0
    for size in _row_sizes(count):
        present = min(size, count - start)
        cells = _shuffled(CELLS.get(present) or SHORT_CELLS[present], shuffler)
        rows.append(_row(sorted(cells) if present in LONE else cells, start, count))
        start += size
    return rows


def place_rows(rows: Sequence[Row], sizes: Sequence[tuple[int, int]], gutter: int) -> list[list[Box]]:
    """Rectangles of panels. Each row fills the width, and its panels have one height, or share it in cells of two.

    The width is that of the narrowest row when each row is as high as its panels are on average, so that panels of one
    size are never enlarged.

    Args:
        rows: of cells; an empty one is as wide as the story's average panel.
        sizes: (width, height) of each panel.
        gutter: pixels between two panels.

    Returns:
        The boxes of each row's panels, as if the row were alone: at the top 0 and the left 0.

    Raises:
        ValueError: a panel that would become too small to be seen, because the shapes are too different.
    """
    average = sum(width / height for width, height in sizes) / len(sizes)
    shapes = [
        [tuple(average if index is None else sizes[index][0] / sizes[index][1] for index in cell) for cell in row]
        for row in rows
    ]
    width = round(min(_natural_width(row, shape, sizes, gutter) for row, shape in zip(rows, shapes)))
    placed = [_place_row(row, shape, width, gutter) for row, shape in zip(rows, shapes)]
    for box in (box for row in placed for box in row):
        if min(box.width, box.height) < SMALLEST_PANEL:
            raise ValueError(
                f"Panel {box.panel + 1} would be {box.width}x{box.height} pixels on its page, as the panels differ too "
                "much in shape or size. Make them more alike, or choose the layout none."
            )
    return placed


def _row_sizes(count: int) -> list[int]:
    """Panels of each row; the last row may be larger than what remains."""
    turns = FEW if count <= FEW_PANELS else MANY
    sizes: list[int] = []
    while (remaining := count - sum(sizes)) > 0:
        size = turns[len(sizes) % len(turns)]
        sizes.append(min(turns) if remaining < min(turns) else size)
    return sizes


def _shuffled(cells: Sequence[int], shuffler: random.Random) -> list[int]:
    shuffled = list(cells)
    shuffler.shuffle(shuffled)
    return shuffled


def _row(cells: Sequence[int], start: int, count: int) -> Row:
    row = []
    for panels in cells:
        row.append(tuple(index if index < count else None for index in range(start, start + panels)))
        start += panels
    return row


def _natural_width(row: Row, shape: Shape, sizes: Sequence[tuple[int, int]], gutter: int) -> float:
    """Of a row that is as high as its panels are on average."""
    heights = [sizes[index][1] for cell in row for index in cell if index is not None]
    slope, offset = _width_by_height(shape, gutter)
    return slope * sum(heights) / len(heights) + offset


def _width_by_height(shape: Shape, gutter: int) -> tuple[float, float]:
    """Slope and offset of a row's width as a function of its height.

    A cell of panels one above the other, of width per height a and b, is (height - gutter) / (1/a + 1/b) wide.
    """
    slopes = [_cell_slope(cell) for cell in shape]
    gutters = [gutter * (len(cell) - 1) for cell in shape]
    between = gutter * (len(shape) - 1)
    return sum(slopes), between - sum(slope * inner for slope, inner in zip(slopes, gutters))


def _cell_slope(cell: tuple[float, ...]) -> float:
    """A cell's width per height of its pictures, gutters left out."""
    return 1 / sum(1 / aspect for aspect in cell)


def _place_row(row: Row, shape: Shape, width: int, gutter: int) -> list[Box]:
    slope, offset = _width_by_height(shape, gutter)
    height = (width - offset) / slope
    boxes, right = [], 0.0
    for number, (cell, aspects) in enumerate(zip(row, shape)):
        # Edges are rounded, not sizes: so the gutters stay equal and the last edge is the width.
        left, right = right, right + _cell_slope(aspects) * (height - gutter * (len(cell) - 1))
        x, w = round(left) + number * gutter, round(right) - round(left)
        boxes += [Box(panel, x, y, w, h, len(cell) == 1) for panel, y, h in _stack(cell, aspects, height, gutter)]
    return boxes


def _stack(cell: Cell, aspects: tuple[float, ...], height: float, gutter: int) -> list[tuple[int, int, int]]:
    """Panel, top and height of the panels of a cell; empty ones are left out."""
    free = round(height) - gutter * (len(cell) - 1)
    placed, low = [], 0.0
    for number, (panel, aspect) in enumerate(zip(cell, aspects)):
        high, low = low, low + free * _cell_slope(aspects) / aspect
        if panel is not None:
            placed.append((panel, round(high) + number * gutter, round(low) - round(high)))
    return placed
