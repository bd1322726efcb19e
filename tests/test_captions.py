"""Captions: lines against the StoryDiffusion demo's, lettering inside its box, and fonts that have the glyphs."""

import json
import logging
import os
import random
from functools import partial
from pathlib import Path

import numpy as np
import PIL
import pytest
import tiny_fonts
from PIL import Image, ImageFont
from safetensors.numpy import load_file

from consistent_video.story import captions, lettering_fonts
from consistent_video.story.font_runs import FontRow
from consistent_video.story.lettering_fonts import (
    BUNDLED,
    BUNDLED_PATH,
    choose_font,
    list_fonts,
    missing_characters,
    share_out,
)

GOLDENS = Path(__file__).parent / "goldens" / "storydiffusion_A"
META = json.loads((GOLDENS / "comic_layout.json").read_text(encoding="utf-8"))
ENGLISH = "He drives to the forest in search of treasure."
CHINESE = "他开着车去森林里寻找宝藏。“真的吗？”猫头鹰Momo问道，「当然！」"
SKY = (90, 140, 200)

bundled = partial(lettering_fonts.open_font, BUNDLED_PATH)


def seven(text: str) -> int:
    """The golden's font: 7 pixels a character."""
    return 7 * len(text)


def one(text: str) -> int:
    return len(text)


def panel(width: int = 768, height: int = 768) -> Image.Image:
    return Image.new("RGB", (width, height), SKY)


def changed(before: Image.Image, after: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the pixels that differ."""
    rows, columns = np.nonzero((np.asarray(before) != np.asarray(after)).any(-1))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


@pytest.mark.parametrize("case", META["wrap"], ids=lambda case: f"{case['text'][:8]}-{case['max_width']}")
def test_lines_equal_the_demo(case):
    lines = captions.wrap(case["text"], case["max_width"], seven, break_words=False)
    assert lines == case["lines"]
    if all(seven(word) <= case["max_width"] for word in case["text"].split()):
        assert captions.wrap(case["text"], case["max_width"], seven) == case["lines"]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("a extraordinary b", 6, ["a", "extrao", "rdinar", "y b"]),
        ("extraordinary", 6, ["extrao", "rdinar", "y"]),
        ("one two\nthree\n\nfour", 20, ["one two", "three", "", "four"]),
        ("one\r\ntwo", 20, ["one", "two"]),
        ("今天天气很好", 4, ["今天天气", "很好"]),
        # Closing punctuation takes the character before it along.
        ("今天天气，很好。", 4, ["今天天", "气，很", "好。"]),
        ("他说「今天很好」吗", 3, ["他说", "「今天", "很好」", "吗"]),
        ("真的吗？！好", 4, ["真的", "吗？！好"]),
        ("カレーライス", 2, ["カ", "レー", "ライ", "ス"]),
        ("去Momo家 go", 5, ["去Momo", "家 go"]),
        ("我爱ComfyUI。", 5, ["我爱", "Comfy", "UI。"]),
        ("한국어는 띄어쓰기를", 6, ["한국어는", "띄어쓰기를"]),
        ("e\u0301e\u0301e\u0301", 4, ["e\u0301e\u0301", "e\u0301"]),
        ("abc", 0, ["a", "b", "c"]),
        ("", 9, [""]),
    ],
)
def test_lines(text, width, lines):
    assert captions.wrap(text, width, one) == lines


def test_no_line_is_too_wide_and_no_character_is_lost():
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choice("ab c。、「」天地(),! ") for _ in range(draw.randrange(60)))
        width = draw.randrange(1, 12)
        lines = captions.wrap(text, width, one)
        assert "".join("".join(lines).split()) == "".join(text.split())
        assert all(len(line) <= width for line in lines)
        assert all(line == line.strip() for line in lines)


def test_closing_punctuation_never_begins_a_line_and_opening_never_ends_one():
    text = CHINESE.replace("Momo", "")
    for width in range(4, 20):
        lines = captions.wrap(text, width, one)
        assert not {line[0] for line in lines} & captions.NO_LINE_START
        assert not {line[-1] for line in lines} & captions.NO_LINE_END


@pytest.mark.parametrize("text", ["", "  ", "\n"])
def test_a_blank_caption_leaves_the_panel(text):
    assert captions.draw_caption(panel(), text, bundled, 45).tobytes() == panel().tobytes()


def test_the_box_is_white_outlined_and_inside_the_panel():
    before = panel()
    after = captions.draw_caption(before, ENGLISH, bundled, 45)
    assert before.tobytes() == panel().tobytes()
    left, top, right, bottom = changed(before, after)
    # 0.4 em around the box at the panel's bottom; it is in the middle.
    assert bottom == 768 - 18
    assert left == 768 - right
    assert 18 <= left < 300
    pixels = np.asarray(after).astype(int)
    middle = (top + bottom) // 2
    # 0.06 em of outline, then white, all around.
    assert (pixels[middle, left : left + 3] == 0).all()
    assert (pixels[middle, left + 3 : left + 12] == 255).all()
    assert (pixels[top + 3 : top + 8, left + 20 : right - 20] == 255).all()
    assert (pixels[bottom - 8 : bottom - 3, left + 20 : right - 20] == 255).all()
    # Rounded corners show the picture.
    assert tuple(pixels[top, left]) == SKY
    # Letters are black on white: nothing of the picture shines through.
    inside = pixels[top + 16 : bottom - 16, left + 16 : right - 16]
    assert (inside.max(-1) == inside.min(-1)).all()
    assert 0.05 < (inside < 128).mean() < 0.4


@pytest.mark.parametrize("size", [(768, 768), (372, 372), (1024, 576), (300, 700), (64, 48)])
def test_captions_scale_with_their_panel(size):
    before = panel(*size)
    after = captions.draw_caption(before, "An owl.", bundled, max(6, round(45 / 768 * min(size))))
    left, top, right, bottom = changed(before, after)
    assert 0 < left < right < size[0]
    assert 0.5 * size[1] < top < bottom < size[1]


def test_letters_shrink_before_the_box_covers_the_panel():
    boxes = {}
    for words in (8, 30, 60, 200):
        left, top, right, bottom = changed(panel(), captions.draw_caption(panel(), "word " * words, bundled, 45))
        assert left > 0 and top > 0 and right < 768 and bottom < 768
        boxes[words] = bottom - top
    assert boxes[8] < 0.2 * 768
    assert boxes[30] <= 0.45 * 768
    assert boxes[60] <= 0.45 * 768
    assert 0.45 * 768 < boxes[200]


# Three lines of 27 pixels; a word too long even at half size is broken, at the first size that leaves the picture room.
@pytest.mark.parametrize(("text", "height"), [("An extraordinary owl", 105), ("W" * 40, 263)])
def test_letters_shrink_before_a_word_is_broken(text, height):
    before = panel(220, 700)
    left, top, right, bottom = changed(before, captions.draw_caption(before, text, bundled, 45))
    assert 0 < left < right < 220
    assert bottom - top == pytest.approx(height, abs=8)


def test_lines_are_about_equally_long():
    lines = captions._fit(panel(), "A man wakes up in a small cabin at the edge of it.", bundled, 45).lines
    widths = [bundled(45).getlength(line) for line in lines]
    assert len(lines) == 2
    assert min(widths) > 0.75 * max(widths)


def test_a_caption_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"Caption 3 \(\d+ characters\) does not fit .* 200x100 pixels, .* 22 pixels"):
        captions.draw_caption(panel(200, 100), "many words " * 30, bundled, 45, name="Caption 3")
    with pytest.raises(ValueError, match="does not fit"):
        captions.draw_caption(panel(20, 400), "W", bundled, 45)


@pytest.mark.skipif(META["pillow"] != PIL.__version__, reason="the golden's letters are those of another Pillow")
def test_the_published_caption_equals_the_demo():
    y, x = np.mgrid[:120, :160]
    channels = (37 * 3 + 20 + 9 * (x // 4 % 2), 91 * 3 + 60 + 9 * (y // 4 % 2), 13 * 3 + 120 + 0 * x)
    before = Image.fromarray(np.stack(channels, -1).astype(np.uint8))
    after = captions.draw_published_caption(before, META["caption"]["text"], ImageFont.load_default(size=14))
    golden = load_file(GOLDENS / "comic_layout.safetensors")["caption.bottom_mid"]
    np.testing.assert_array_equal(np.asarray(after), golden)


def test_a_blank_published_caption_leaves_the_panel():
    assert captions.draw_published_caption(panel(), "", bundled(45)).tobytes() == panel().tobytes()


@pytest.fixture
def fonts(tmp_path):
    """A folder of the user's fonts and one of the system's."""
    own, system = tmp_path / "own", tmp_path / "system"
    (own / "sub").mkdir(parents=True)
    system.mkdir()
    tiny_fonts.build(own / "sub" / "Zwei.ttf", "abc")
    tiny_fonts.build(own / "eins.otf", "ab天")
    tiny_fonts.build(system / "Slant-BoldItalic.ttf", "天地人")
    tiny_fonts.build(system / "Plain.ttf", "天地人")
    tiny_fonts.build(system / "Upright-Bold.ttf", "天地人")
    tiny_fonts.build(system / "Zwei.ttf", "天地人")
    tiny_fonts.build(system / "Blank-Bold.otf", "", blank="天地人玄")
    tiny_fonts.build(system / "LastResort.otf", "天地人玄")
    (system / "Damaged-Bold.ttc").write_bytes(b"no font")
    (system / "readme.txt").write_text("no font", encoding="utf-8")
    return [own], [system]


def test_fonts_are_listed_once_the_bundled_one_first(fonts):
    (own,), (system,) = fonts
    found = list_fonts([own, own / "missing"], [system])
    expected = [BUNDLED, "eins.otf", "Zwei.ttf"]
    expected += ["Blank-Bold.otf", "Damaged-Bold.ttc", "Plain.ttf", "Slant-BoldItalic.ttf", "Upright-Bold.ttf"]
    assert list(found) == expected
    assert found[BUNDLED] == BUNDLED_PATH
    assert found["Zwei.ttf"] == own / "sub" / "Zwei.ttf"


def test_system_folders():
    home = Path("home")
    linux = lettering_fonts.system_folders("linux", {}, home)
    assert linux == [
        home / ".fonts",
        home / ".local" / "share" / "fonts",
        Path("/usr/local/share/fonts"),
        Path("/usr/share/fonts"),
    ]
    xdg = lettering_fonts.system_folders("linux", {"XDG_DATA_HOME": "/data", "XDG_DATA_DIRS": "/x:/y"}, home)
    assert xdg[1:] == [Path("/data/fonts"), Path("/x/fonts"), Path("/y/fonts")]
    mac = lettering_fonts.system_folders("darwin", {}, home)
    assert mac == [home / "Library" / "Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    windows = lettering_fonts.system_folders("win32", {"WINDIR": "W", "LOCALAPPDATA": "L"}, home)
    assert windows == [Path("W") / "Fonts", Path("L") / "Microsoft" / "Windows" / "Fonts"]


def test_missing_characters():
    assert missing_characters(BUNDLED_PATH, "“Café” – naïve… Łódź, 5 €!\n\t\u200d\ufe0f") == []
    assert missing_characters(BUNDLED_PATH, "a天b地天") == ["天", "地"]


def test_every_character_of_the_bundled_font_is_found():
    from fontTools.ttLib import TTFont

    characters = [chr(code) for code in TTFont(BUNDLED_PATH).getBestCmap()]
    assert missing_characters(BUNDLED_PATH, "".join(characters)) == []
    absent = [chr(code) for code in range(0x400, 0x500)]
    assert missing_characters(BUNDLED_PATH, "".join(absent)) == absent


def test_no_folder_is_searched_while_the_bundled_font_will_do(monkeypatch):
    monkeypatch.setattr(os, "walk", None)
    assert choose_font(BUNDLED, ENGLISH) == BUNDLED_PATH


def test_another_font_is_chosen_for_characters_that_are_missing(fonts, caplog):
    own, system = fonts
    with caplog.at_level(logging.INFO):
        assert choose_font(BUNDLED, "天", own, system) == own[0] / "eins.otf"
    assert "Captions are written in eins.otf, because ComicNeue-Bold.otf has no 天 (U+5929)" in caplog.text
    # Upright and bold before the others; damaged, blank and placeholder fonts never.
    assert choose_font(BUNDLED, "天地", own, system) == system[0] / "Upright-Bold.ttf"
    assert choose_font("Plain.ttf", "天地", own, system) == system[0] / "Plain.ttf"
    assert choose_font("Zwei.ttf", "abc", own, system) == own[0] / "sub" / "Zwei.ttf"


def test_characters_without_one_font_for_all_are_shared_out(fonts, caplog):
    own, system = fonts
    with caplog.at_level(logging.INFO):
        paths, home, absent = share_out(BUNDLED, "天a玄\ud83d", own, system)
    assert paths == (BUNDLED_PATH, own[0] / "eins.otf") and home == {"天": 1} and absent == {"玄", "\ud83d"}
    assert "in ComicNeue-Bold.otf and eins.otf, because ComicNeue-Bold.otf has no 天" in caplog.text
    warning = next(record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert "No font has 玄 (U+7384), half a character (U+D83D)" in warning and str(own[0]) in warning
    warning.encode()
    assert choose_font(BUNDLED, "天a玄", own, system) == BUNDLED_PATH


def test_all_fonts_lacking_something_are_told_with_the_place_for_more(caplog):
    many = "".join(chr(0x4E00 + index) for index in range(14))
    with caplog.at_level(logging.WARNING):
        paths, home, absent = share_out(BUNDLED, many, (), ())
    assert paths == (BUNDLED_PATH,) and not home and absent == set(many)
    assert "and 4 more: left out" in caplog.text and "into the system's font folder" in caplog.text


def test_a_line_in_several_fonts_has_each_run_in_its_own(tmp_path):
    first = tiny_fonts.build(tmp_path / "first.ttf", "ab\u0301 ")
    second = tiny_fonts.build(tmp_path / "second.ttf", "天地", width=2000)
    row = FontRow((first, second), {"天": 1, "地": 1}, frozenset("玄"))
    font = row.open(20)
    names = [(piece, used.path) for piece, used in font.runs("ab 天 地b\u0301")]
    assert names == [("ab ", str(first)), ("天 地", str(second)), ("b\u0301", str(first))]
    assert font.getlength("a天") == font.fonts[0].getlength("a") + font.fonts[1].getlength("天") == 20 + 40
    left, top, right, bottom = font.getbbox("a天", anchor="ms")
    assert left >= -30 and right <= 30 and right - left > 50 and (top, bottom) == (-14, 0)
    assert font.getbbox("a", anchor="ms") == font.fonts[0].getbbox("a", anchor="ms")
    assert row.drawable("a玄\ufe0f b") == "a b" and row.drawable("ab") == "ab"
    assert FontRow((first,)).open(20).getlength("a") == 20


def test_captions_in_several_fonts_are_drawn(tmp_path):
    row = FontRow((BUNDLED_PATH, tiny_fonts.build(tmp_path / "second.ttf", "天地")), {"天": 1, "地": 1})
    for draw in (
        lambda text: captions.draw_caption(panel(), text, row.open, 45),
        lambda text: captions.draw_published_caption(panel(), text, row.open(45)),
    ):
        plain = changed(panel(), draw("owl owl"))
        mixed = changed(panel(), draw("owl 天地 owl"))
        assert mixed[0] < plain[0] - 40 and mixed[2] > plain[2] + 40 and abs(mixed[3] - plain[3]) <= 8


def test_unknown_and_damaged_fonts_are_refused(fonts):
    own, system = fonts
    with pytest.raises(ValueError, match="Unknown font 'Arial.ttf'. Choose one of: ComicNeue-Bold.otf, eins.otf"):
        choose_font("Arial.ttf", "a", own, system)
    with pytest.raises(ValueError, match=r"Damaged-Bold.ttc is no font"):
        choose_font("Damaged-Bold.ttc", "a", own, system)


def test_variable_fonts_are_bold(tmp_path):
    path = tiny_fonts.build_variable(tmp_path / "Variable.ttf", "a")
    thin = ImageFont.truetype(str(path), 100).getbbox("a", anchor="ls")
    bold = lettering_fonts.open_font(path, 100).getbbox("a", anchor="ls")
    assert (thin[1], bold[1]) == (-70, -90)


def test_the_bundled_font_has_its_licence():
    text = (BUNDLED_PATH.parent / "OFL.txt").read_text(encoding="utf-8")
    assert "Copyright 2014 The Comic Neue Project Authors" in text
    assert "SIL OPEN FONT LICENSE Version 1.1" in text
