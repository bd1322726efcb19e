"""Comic pages against pages of the StoryDiffusion demo, and the printed form against what it promises."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny_fonts
import torch
from safetensors.numpy import load_file

from consistent_video.story import pages
from consistent_video.story.page_rows import classic_rows, place_rows, published_rows, square_rows

GOLDENS = Path(__file__).parent / "goldens" / "storydiffusion_A"
META = json.loads((GOLDENS / "comic_layout.json").read_text(encoding="utf-8"))
STYLES = {"Classic Comic Style": "classic", "Four Pannel": "four_panel"}
MIXED = [(320, 180), (180, 320), (240, 240), (320, 180), (200, 260), (260, 200), (180, 320), (320, 180), (240, 240)]
WHITE, GREY, LINE = (255, 255, 255), (120, 130, 140), (0, 0, 0)


def golden_panel(index: int, width: int, height: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    channels = (37 * index + 20 + 9 * (x // 4 % 2), 91 * index + 60 + 9 * (y // 4 % 2), 13 * index + 120 + 0 * x)
    return np.stack(channels, -1).astype(np.uint8)


def plain(width: int, height: int, colour: tuple = GREY) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def noise(width: int, height: int, seed: int) -> np.ndarray:
    """A picture without black or white pixels."""
    return np.random.default_rng(seed).integers(20, 235, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("case", META["cases"], ids=lambda case: f"{STYLES[case['style']]}-{case['panels']}")
def test_published_layouts_equal_the_demo(case):
    golden = load_file(GOLDENS / "comic_layout.safetensors")
    count = case["panels"]
    panels = [golden_panel(index, *case["panel_size"]) for index in range(count)]
    result = pages.lay_out(panels, [""] * count, STYLES[case["style"]], seed=case["seed"], published=True)
    assert len(result) == len(case["outputs"])
    for page, output in zip(result, case["outputs"]):
        np.testing.assert_array_equal(page, golden[output["key"]])


@pytest.mark.parametrize("case", [case for case in META["cases"] if case["shuffles"]], ids=lambda case: case["panels"])
def test_cells_are_shuffled_as_published(case):
    rows = published_rows(case["panels"], case["seed"])
    assert [[len(cell) for cell in row] for row in rows] == case["shuffles"]
    flat = [[-1 if index is None else index for cell in row for index in cell] for row in rows]
    assert flat == case["groups"]


@pytest.mark.parametrize("seed", range(20))
def test_the_seed_is_that_of_the_global_generator(seed):
    random.seed(seed)
    expected = []
    for cells in ([1, 1, 2], [1, 1, 2, 2], [1, 1, 2], [1, 1, 2, 2]):
        random.shuffle(cells)
        expected.append(cells)
    assert [[len(cell) for cell in row] for row in published_rows(20, seed)] == expected
    assert classic_rows(20, seed) == published_rows(20, seed)


def test_published_captions_are_on_full_cells_only():
    panels, texts = [plain(120, 120)] * 4, ["Owl"] * 4
    with_text = pages.lay_out(panels, texts, "classic", size=20, seed=5, published=True)[0]
    without = pages.lay_out(panels, [""] * 4, "classic", size=20, seed=5, published=True)[0]
    # The order of seed 5 is full, full, stacked.
    parts = [(with_text[:, left:right] != without[:, left:right]).any() for left, right in ((0, 140), (140, 280))]
    assert parts == [True, True]
    np.testing.assert_array_equal(with_text[:, 280:], without[:, 280:])


def test_published_panels_of_several_sizes():
    panels = [plain(120, 120), plain(100, 140)]
    with pytest.raises(ValueError, match=r"panels of one size, but found \(120, 120\) and \(100, 140\)"):
        pages.lay_out(panels, ["", ""], "classic", published=True)
    assert pages.lay_out(panels, ["", ""], "four_panel", published=True)[0].shape[1] == 240
    assert [page.shape for page in pages.lay_out(panels, ["", ""], "none", published=True)] == [
        (120, 120, 3),
        (140, 100, 3),
    ]


@pytest.mark.parametrize("layout", ["four_panel", "classic"])
@pytest.mark.parametrize("count", [*range(1, 15), 24])
@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "mixed"])
def test_a_page_is_white_but_for_panels_and_their_lines(layout, count, mixed):
    """Panels of one colour: the page has that colour, white, and black lines one pixel beside the panels."""
    sizes = [MIXED[index % len(MIXED)] if mixed else (240, 240) for index in range(count)]
    seen = 0
    for page in pages.lay_out([plain(*size) for size in sizes], [""] * count, layout, seed=count):
        panel, line, white = ((page == colour).all(-1) for colour in (GREY, LINE, WHITE))
        assert (panel | line | white).all()
        grown = np.zeros_like(panel)
        height, width = panel.shape
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                grown[1 : height - 1, 1 : width - 1] |= panel[
                    1 + down : height - 1 + down, 1 + right : width - 1 + right
                ]
        np.testing.assert_array_equal(line, grown & ~panel)
        margin = round(np.mean([size[1] for size in sizes]) / 24)
        inside = np.zeros_like(white)
        inside[margin - 1 : 1 - margin, margin - 1 : 1 - margin] = True
        assert white[~inside].all()
        # A panel's upper left corner has no panel to its left and above.
        seen += (panel[1:, 1:] & ~panel[:-1, 1:] & ~panel[1:, :-1]).sum()
    assert seen == count


@pytest.mark.parametrize("count", range(1, 25))
@pytest.mark.parametrize("arrange", [lambda count: square_rows(count), lambda count: classic_rows(count, count)])
def test_rows_are_filled_and_gutters_are_even(count, arrange):
    sizes = [tuple(3 * side for side in MIXED[index % len(MIXED)]) for index in range(count)]
    rows, gutter = arrange(count), 24
    placed = place_rows(rows, sizes, gutter)
    assert [box.panel for row in placed for box in row] == list(range(count))
    width = max(box.left + box.width for row in placed for box in row)
    for cells, row in zip(rows, placed):
        boxes = {box.panel: box for box in row}
        height = max(box.top + box.height for box in row)
        columns = [[boxes[index] for index in cell if index is not None] for cell in cells]
        for cell, column in zip(cells, columns):
            assert len({(box.left, box.width, box.full) for box in column}) <= 1
            for above, below in zip(column, column[1:]):
                assert below.top - above.top - above.height == gutter
            if None not in cell:
                assert column[0].top == 0
                assert column[-1].top + column[-1].height == height
        present = [column for column in columns if column]
        for left, right in zip(present, present[1:]):
            assert right[0].left - left[0].left - left[0].width == gutter
        if len(present) == len(cells):
            assert present[-1][0].left + present[-1][0].width == width
        for box in row:
            wanted = sizes[box.panel][0] / sizes[box.panel][1]
            # Up to a pixel of rounding each way.
            assert (box.width - 1) / (box.height + 1) < wanted < (box.width + 1) / (box.height - 1)


def test_panels_of_one_size_are_not_enlarged_and_kept_exactly_where_they_fit():
    panels = [noise(240, 240, seed) for seed in range(10)]
    for layout in ("four_panel", "classic"):
        placed = place_rows(square_rows(10) if layout == "four_panel" else classic_rows(10, 0), [(240, 240)] * 10, 8)
        assert max(box.width for row in placed for box in row) == 240
    page = pages.lay_out(panels, [""] * 10, "four_panel")[0]
    # Margins of 10 and gutters of 8 pixels.
    assert page.shape == (2 * 240 + 8 + 20, 2 * 240 + 8 + 20, 3)
    for index, (top, left) in enumerate(((10, 10), (10, 258), (258, 10), (258, 258))):
        np.testing.assert_array_equal(page[top : top + 240, left : left + 240], panels[index])


@pytest.mark.parametrize(
    ("count", "cells"),
    [
        (1, [[1]]),
        (2, [[1, 1]]),
        (3, [[1, 1, 1]]),
        (4, [[1, 1, 2]]),
        (5, [[1, 1, 2], [1, 1, 2]]),
        (7, [[1, 1, 2], [1, 1, 1]]),
        (9, [[1, 1, 2], [1, 1, 1, 2]]),
        (10, [[1, 1, 2], [1, 1, 2, 2]]),
        (12, [[1, 1, 2], [1, 1, 2, 2], [1, 1, 2]]),
        (18, [[1, 1, 2], [1, 1, 2, 2], [1, 1, 2], [1, 1, 2]]),
    ],
)
def test_last_rows_are_arranged_for_the_panels_that_they_have(count, cells):
    rows = classic_rows(count, seed=1)
    assert [sorted(len(cell) for cell in row) for row in rows] == cells
    empty = [cell for row in rows for cell in row if None in cell]
    assert len(empty) == {5: 2, 12: 1}.get(count, 0)
    # Left-over panels come first, in full cells.
    assert all(set(cell) == {None} for cell in empty)


def test_long_stories_break_into_pages_of_a_comic_books_proportions():
    panels = [plain(96, 96)] * 40
    result = pages.lay_out(panels, [""] * 40, "classic")
    assert len(result) == 2
    assert all(page.shape[0] / page.shape[1] <= 10.25 / 6.625 for page in result)
    assert len({page.shape[1] for page in result}) == 1
    assert len(pages.lay_out(panels, [""] * 40, "four_panel")) == 10


def test_the_seed_arranges_the_classic_layout():
    panels = [noise(96, 96, seed) for seed in range(10)]
    texts = [f"Panel {index}" for index in range(10)]
    by_seed = [pages.lay_out(panels, texts, "classic", seed=seed)[0] for seed in range(6)]
    again = [pages.lay_out(panels, texts, "classic", seed=seed)[0] for seed in range(6)]
    for first, second in zip(by_seed, again):
        np.testing.assert_array_equal(first, second)
    assert len({page.tobytes() for page in by_seed}) > 2
    four = [pages.lay_out(panels, texts, "four_panel", seed=seed)[0] for seed in range(2)]
    np.testing.assert_array_equal(*four)


@pytest.mark.parametrize("layout", pages.LAYOUTS)
def test_every_panel_has_its_caption_inside(layout):
    panels = [plain(*MIXED[index % len(MIXED)]) for index in range(10)]
    texts = [f"Panel {index}" for index in range(10)]
    captioned = pages.lay_out(panels, texts, layout, seed=2)
    bare = pages.lay_out(panels, [""] * 10, layout, seed=2)
    lettered = 0
    for before, after in zip(bare, captioned):
        assert before.shape == after.shape
        changed = (before != after).any(-1)
        assert (before[changed] == GREY).all()
        for left, top, right, bottom in outlines(before):
            part = changed[top:bottom, left:right]
            lettered += part.any()
            rows, columns = np.nonzero(part)
            # The middle of the lower half.
            assert abs((columns.min() + columns.max() + 1) / 2 - part.shape[1] / 2) <= 1
            assert 0.4 * part.shape[0] < rows.min() < rows.max() < part.shape[0] - 1
    assert lettered == 10


def outlines(page: np.ndarray) -> list[tuple[int, int, int, int]]:
    """Left, top, right, bottom of the grey panels of a page."""
    panel = (page == GREY).all(-1)
    framed = np.pad(panel, 1)
    corners = np.argwhere(framed[1:-1, 1:-1] & ~framed[:-2, 1:-1] & ~framed[1:-1, :-2])
    found = []
    for top, left in corners:
        right = left + np.argmin(np.append(panel[top, left:], False))
        bottom = top + np.argmin(np.append(panel[top:, left], False))
        found.append((left, top, right, bottom))
    return found


def test_blank_captions_need_no_font(tmp_path):
    panels = [plain(96, 96)] * 2
    assert len(pages.lay_out(panels, ["", " "], "none", font=tmp_path / "missing.ttf")) == 2


def test_the_letters_size():
    def height(**settings):
        panels = [plain(768, 768)] * 4
        bare, lettered = (pages.lay_out(panels, [text] * 4, "four_panel", **settings)[0] for text in ("", "Owl"))
        return (bare != lettered)[:800].any((1, 2)).sum()

    automatic = height()
    assert automatic == height(size=45)
    assert height(size=90) > 1.7 * automatic
    assert height(size=20) < 0.6 * automatic


def test_images_of_the_graph_become_one_batch():
    images = torch.rand(5, 96, 128, 3, generator=torch.Generator().manual_seed(0))
    copy = images.clone()
    result = pages.make_pages(images, ["Owl"] * 5, "four_panel")
    assert torch.equal(images, copy)
    # Gutter 3 and margins 4 pixels; the second page has one panel, on paper as large as the first.
    assert result.shape == (2, 2 * 96 + 3 + 8, 2 * 128 + 3 + 8, 3)
    assert result.dtype == torch.float32
    assert (result.min(), result.max()) == (0, 1)
    assert (result[1, 104:] == 1).all()
    single = pages.make_pages(images, [""] * 5, "none")
    torch.testing.assert_close(single, (images * 255).round() / 255)


def test_a_list_of_images_may_mix_sizes():
    images = [torch.full((40, 60, 3), 0.25), torch.full((2, 80, 30, 3), 0.5)]
    result = pages.make_pages(images, [""] * 3, "none")
    assert result.shape == (3, 80, 60, 3)
    assert (result[0, 20:60] == 64 / 255).all()
    assert (result[0, :20] == 1).all() and (result[0, 60:] == 1).all()
    assert (result[1, :, 15:45] == 128 / 255).all()
    assert (result[1, :, :15] == 1).all() and (result[1, :, 45:] == 1).all()


def test_accents_are_composed():
    images = torch.full((1, 96, 96, 3), 0.5)
    composed, decomposed = (pages.make_pages(images, [text], "none") for text in ("\u0150z", "O\u030bz"))
    assert torch.equal(composed, decomposed)


def test_captions_in_another_script(tmp_path):
    tiny_fonts.build(tmp_path / "Tiny.ttf", "天地人。")
    images = torch.full((4, 96, 96, 3), 0.5)
    texts = ["天地人。天地人。天地人。", "", "天", "地"]
    own = pages.make_pages(images, texts, "classic", font="Tiny.ttf", font_folders=[tmp_path])
    found = pages.make_pages(images, texts, "classic", font_folders=[tmp_path])
    assert torch.equal(own, found)
    assert not torch.equal(own, pages.make_pages(images, [""] * 4, "classic"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"images": []}, "There are no images"),
        ({"captions": ["a"]}, "Found 2 images but 1 captions"),
        ({"captions": ["a"] * 3}, "Found 2 images but 3 captions"),
        ({"layout": "manga"}, "Unknown layout 'manga'. Choose one of: four_panel, classic, none"),
        ({"size": 5}, "size is 5. Choose 0 .automatic. or 6 to 512"),
        ({"size": 513}, "size is 513"),
        ({"size": -1}, "size is -1"),
        ({"images": [plain(9, 9), plain(9, 9)[..., :1]]}, r"Image 2 is \(9, 9, 1\) uint8. Expected"),
        ({"images": [plain(9, 9) / 255.0, plain(9, 9)]}, r"Image 1 is \(9, 9, 3\) float64"),
        ({"captions": ["fine", "long " * 99], "layout": "none"}, r"Caption 2 \(494 characters\) does not fit"),
        ({"images": [plain(4000, 4), plain(4, 400)]}, "Panel 2 would be 2x202 pixels"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(settings, message):
    settings = {"images": [plain(90, 90)] * 2, "captions": ["", ""], **settings}
    with pytest.raises(ValueError, match=message):
        pages.lay_out(**settings)


@pytest.mark.parametrize("images", [torch.zeros(2, 9, 9, 5), torch.zeros(2, 9, 9), [torch.zeros(1, 2, 9, 9, 3)]])
def test_images_of_other_shapes_are_refused(images):
    with pytest.raises(ValueError, match="xpected"):
        pages.make_pages(images, [""] * 2)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="There are no images"):
        pages.make_pages(torch.zeros(0, 9, 9, 3), [])
