"""Fonts for captions: the bundled one, those of given folders and of the system, and which have a text's glyphs.

Pillow does not tell which characters a font has. A character that a font lacks is drawn as the font's "missing" glyph,
so a character counts as present when its glyph differs from that of a code point that will never be assigned.
"""

import logging
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import ImageFont

BUNDLED = "ComicNeue-Bold.otf"
BUNDLED_PATH = Path(__file__).parent / "typefaces" / BUNDLED
SUFFIXES = (".ttf", ".otf", ".ttc")
# Apple's font of placeholders: it draws every character as a picture of its script's name.
PLACEHOLDERS = "lastresort"
NEVER_ASSIGNED = "\U0010ffff"
# Large enough that two glyphs do not look alike by chance.
PROBE_SIZE = 32
# Control, format and space characters have no ink of their own.
INKLESS = {"Cc", "Cf", "Zl", "Zp", "Zs"}
VARIATION_SELECTORS = range(0xFE00, 0xFE10)
SHOWN = 10


def system_folders(platform: str, environment: Mapping[str, str], home: Path) -> list[Path]:
    """Where a system keeps its fonts, and its user's; they need not exist.

    Args:
        platform: as `sys.platform`; what is neither win32 nor darwin follows the XDG Base Directory Specification.
        environment: as `os.environ`.
        home: the user's folder.
    """
    if platform == "win32":
        local = environment.get("LOCALAPPDATA", str(home / "AppData" / "Local"))
        return [
            Path(environment.get("WINDIR", r"C:\Windows")) / "Fonts",
            Path(local) / "Microsoft" / "Windows" / "Fonts",
        ]
    if platform == "darwin":
        return [home / "Library" / "Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    user = environment.get("XDG_DATA_HOME") or str(home / ".local" / "share")
    shared = environment.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [home / ".fonts", *(Path(folder) / "fonts" for folder in [user, *shared.split(":")])]


def list_fonts(folders: Sequence[Path] = (), system: Sequence[Path] | None = None) -> dict[str, Path]:
    """File names of fonts and where they are: the bundled font, then each folder's in alphabetical order.

    Only names are read, no font is opened. Of two files with one name the first stands.

    Args:
        folders: searched with their subfolders, before the system's; missing ones are passed over.
        system: the system's font folders, None for those of this machine.
    """
    fonts = {BUNDLED: BUNDLED_PATH}
    for folder in [*folders, *(_own_system_folders() if system is None else system)]:
        found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
        for path in sorted(found, key=lambda path: (path.name.lower(), path)):
            if path.suffix.lower() in SUFFIXES and not path.name.lower().startswith((PLACEHOLDERS, ".")):
                fonts.setdefault(path.name, path)
    return fonts


def choose_font(name: str, text: str, folders: Sequence[Path] = (), system: Sequence[Path] | None = None) -> Path:
    """The main font of a text: the first of `share_out`."""
    return share_out(name, text, folders, system)[0][0]


def share_out(
    name: str, text: str, folders: Sequence[Path] = (), system: Sequence[Path] | None = None
) -> tuple[tuple[Path, ...], dict[str, int], frozenset[str]]:
    """The fonts that a text is written in: the named one; or one that has all characters; or several together.

    Fonts of `folders` are tried first, in their order; then the system's upright bold ones, its other upright ones and
    the rest. Where no font has all characters, the named one keeps those that it has, and each other character goes to
    the first font that has it. The change is logged, and so are characters that no font has. The folders are not
    searched while the bundled font will do.

    Args:
        name: one of `list_fonts`.
        text: all that is to be written.
        folders, system: as of `list_fonts`.

    Returns:
        Fonts; characters that are in another than the first, with the index of their font; characters without a font.

    Raises:
        ValueError: an unknown name, or a damaged font.
    """
    if name == BUNDLED and not missing_characters(BUNDLED_PATH, text):
        return (BUNDLED_PATH,), {}, frozenset()
    fonts = list_fonts(folders, system)
    if name not in fonts:
        raise ValueError(f"Unknown font {name!r}. Choose one of: {_excerpt(list(fonts), ', ')}.")
    missing = missing_characters(fonts[name], text)
    if not missing:
        return (fonts[name],), {}, frozenset()
    own = list(list_fonts(folders, ()).values())
    others = [path for path in fonts.values() if path not in own]
    paths, home = [fonts[name]], {}
    for path in [*own, *sorted(others, key=_rank)]:
        lacks = _lacks(path, text)
        if not lacks:
            logging.info("Captions are written in %s, because %s has no %s", path.name, name, _shown(missing))
            return (path,), {}, frozenset()
        found = [character for character in missing if character not in home and character not in lacks]
        home.update(dict.fromkeys(found, len(paths)))
        paths += [path] if found else []
    absent = [character for character in missing if character not in home]
    _log_fallbacks(name, paths[1:], missing, absent, folders)
    return tuple(paths), home, frozenset(absent)


def _log_fallbacks(
    name: str, paths: Sequence[Path], missing: list[str], absent: list[str], folders: Sequence[Path]
) -> None:
    if paths:
        names = _excerpt([path.name for path in paths], ", ")
        logging.info("Captions are written in %s and %s, because %s has no %s", name, names, name, _shown(missing))
    if absent:
        logging.warning(
            "No font has %s: left out of the captions. Put a font file that has them (.ttf, .otf or .ttc) into %s: "
            "Noto Sans CJK has Chinese, Japanese and Korean, Noto Emoji the emoji, other Noto fonts the other scripts.",
            _shown(absent),
            " or ".join(str(folder) for folder in folders) or "the system's font folder",
        )


def _shown(characters: Sequence[str]) -> str:
    """Characters and their numbers, for a message; half characters cannot be written."""
    names = [
        f"half a character (U+{ord(sign):04X})" if _is_half(sign) else f"{sign} (U+{ord(sign):04X})"
        for sign in characters
    ]
    return _excerpt(names, ", ")


def missing_characters(path: Path, text: str) -> list[str]:
    """Characters of a text that a font lacks, each once, in their order. Spaces and controls need no glyph.

    Raises:
        ValueError: a file that is no scalable font.
    """
    font = open_font(path, PROBE_SIZE, ImageFont.Layout.BASIC)
    absent = _glyph(font, NEVER_ASSIGNED)
    inked = filter(is_inked, dict.fromkeys(text))
    return [character for character in inked if _is_half(character) or not _drawn(font, character, absent)]


def open_font(path: Path, size: int, engine: ImageFont.Layout | None = None) -> ImageFont.FreeTypeFont:
    """A font file at a size in pixels per em; variable fonts in their bold weight, which comics are lettered in.

    Args:
        path: of collections (.ttc) the first font is taken.
        engine: Pillow's text layout, None for the best that there is.

    Raises:
        ValueError: a file that is no scalable font.
    """
    try:
        font = ImageFont.truetype(str(path), size, layout_engine=engine)
    except OSError as error:
        raise ValueError(f"{path} is no font that can be scaled ({error}). Choose another font.") from error
    if b"Bold" in _variations(font):
        font.set_variation_by_name("Bold")
    return font


def _variations(font: ImageFont.FreeTypeFont) -> list[bytes]:
    """Named instances of a variable font; none for others, which Pillow reports as an error."""
    try:
        return font.get_variation_names()
    except OSError:
        return []


def _own_system_folders() -> list[Path]:
    return system_folders(sys.platform, os.environ, Path(os.path.expanduser("~")))


def _rank(path: Path) -> int:
    """0 for upright bold fonts, 1 for other upright ones, 2 and 3 for slanted and typewriter ones."""
    name = path.stem.lower()
    unusual = any(word in name for word in ("italic", "oblique", "mono"))
    return 2 * unusual + ("bold" not in name)


def _lacks(path: Path, text: str) -> set[str]:
    """Characters that a font lacks; damaged files and bitmap fonts, which systems do have, lack all of them."""
    try:
        return set(missing_characters(path, text))
    except ValueError:
        return set(text)


def is_inked(character: str) -> bool:
    """Whether a character needs a glyph: spaces, controls and variation selectors do not."""
    return unicodedata.category(character) not in INKLESS and ord(character) not in VARIATION_SELECTORS


def _is_half(character: str) -> bool:
    """Whether it is half of a surrogate pair, as cut text has it."""
    return unicodedata.category(character) == "Cs"


def _drawn(font: ImageFont.FreeTypeFont, character: str, absent: tuple) -> bool:
    """Whether a character has a glyph of its own that is not blank."""
    glyph = _glyph(font, character)
    return any(glyph[0]) and glyph != absent


def _glyph(font: ImageFont.FreeTypeFont, character: str) -> tuple:
    """A character's picture, its size, place and advance."""
    mask, offset = font.getmask2(character, "L")
    return bytes(mask), mask.size, offset, font.getlength(character)


def _excerpt(items: list[str], separator: str) -> str:
    """The first of some words, and how many more there are."""
    rest = len(items) - SHOWN
    return separator.join(items[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
