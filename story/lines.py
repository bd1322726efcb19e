"""Typed text -> lines and tags: quotes, full-width signs, tabs and odd line ends do not matter.

The signs that have a meaning are exchanged one for one, so that a position in the plain text is the same one in the
typed text, from which captions are taken.
"""

import re
import unicodedata
from collections.abc import Iterator

# Straight quotes also because CLIP learned from text that was cleaned to them (OpenAI CLIP, simple_tokenizer, ftfy).
_PLAIN = str.maketrans(
    {
        **dict.fromkeys("\u3010\uff3b\u3014\u3016", "["),  # lenticular, tortoise shell and full-width brackets
        **dict.fromkeys("\u3011\uff3d\u3015\u3017", "]"),
        "\uff03": "#",
        **dict.fromkeys("\u201c\u201d\u201e\u201f\uff02", '"'),
        **dict.fromkeys("\u2018\u2019\u201a\u201b\uff07", "'"),
    }
)
# Byte order mark, zero-width space, word joiner and marks of writing direction come with pasted text and are invisible
# in a text box; half characters come with cut text, and neither fonts nor text encoders take them.
_INVISIBLE = dict.fromkeys(
    (0xFEFF, 0x200B, 0x2060, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xD800, 0xE000))
)
_TAG = re.compile(r"\[([^\[\]]*)\]")
# [NC] anywhere, or NC in capitals: in round brackets, or as the first word.
_NO_CHARACTER = re.compile(
    r"[\[\u3010\uff3b\u3014\u3016]\s*(?i:NC|\uff2e\uff23)\s*[\]\u3011\uff3d\u3015\u3017]\s*[:\uff1a]?"
    r"|[(\uff08]\s*(?:NC|\uff2e\uff23)\s*[)\uff09]\s*[:\uff1a]?|^\s*(?:NC|\uff2e\uff23)(?:\s*[:\uff1a]|(?=\s))"
)
_CAPTION_SIGN = re.compile("#+")
_COLOUR = re.compile(r"#([0-9a-f]{3}|[0-9a-f]{6}|[0-9a-f]{8})(?!\w)", re.IGNORECASE)
Line = tuple[int, str]  # number in the text from 1, and what is on it
_LOOSE_QUOTE = re.compile(r"(?<!\w)['\"]|['\"](?!\w)")
# Opening and closing signs, with their curly and full-width forms: no space after, and before them.
_BEFORE_SPACE = "([{\"'\u201c\u2018\uff08\u300c\u300e\u300a-/"
_AFTER_SPACE = ")]},.;:!?\"'\u201d\u2019\u2026\uff09\u300d\u300f\u300b\uff0c\u3002\u3001\uff1b\uff1a\uff01\uff1f-/"


def numbered_lines(text: str) -> Iterator[Line]:
    """The lines that are not blank, without outer white space and enclosing quotes, with their number in the text.

    Args:
        text: any line ends (Windows, Unix, old Mac).

    Yields:
        (line number from 1, line).
    """
    for number, line in enumerate(text.translate(_INVISIBLE).splitlines(), start=1):
        line = unquote(line)
        if line:
            yield number, line


def plain(typed: str) -> str:
    """The text with [ ] # and straight quotes in place of their full-width and curly forms; of the same length."""
    return typed.translate(_PLAIN)


def unquote(typed: str) -> str:
    """The text without outer white space and without the quotes around it, if one pair encloses all of it."""
    typed = typed.strip()
    signs = plain(typed)
    enclosed = len(signs) > 1 and signs[0] == signs[-1] and signs[0] in "'\""
    if enclosed and not _LOOSE_QUOTE.search(signs[1:-1]):
        return typed[1:-1].strip()
    return typed


def take_no_character(typed: str) -> tuple[str, bool]:
    """The text without its [NC] tags, and whether there were any; wherever they stand, as published."""
    rest, count = _NO_CHARACTER.subn("", typed)
    return rest.strip(), count > 0


def caption_sign(signs: str, last: bool = True) -> re.Match | None:
    """The last # (or several in a row) that is not the start of a colour such as #ff8800; None if there is none.

    Args:
        signs: plain text.
        last: False for the first one.
    """
    found = [match for match in _CAPTION_SIGN.finditer(signs) if not _is_colour(signs, match)]
    return found[-1 if last else 0] if found else None


def _is_colour(signs: str, sign: re.Match) -> bool:
    """Whether hexadecimal digits of a colour follow a #; words and numbers of such letters are not colours."""
    colour = _COLOUR.match(signs, sign.end() - 1)
    if colour is None or len(sign[0]) > 1:
        return False
    digits = colour[1].lower()
    if digits.isdigit():
        return len(digits) > 3 or digits == "000"
    doubled = all(pair[0] == pair[-1] for pair in re.findall("..", digits))
    return any(digit.isdigit() for digit in digits) or (doubled if len(digits) > 3 else digits == digits[0] * 3)


def split_at(typed: str, sign: re.Match) -> tuple[str, str]:
    """The text before and after a sign, both without outer white space."""
    return typed[: sign.start()].strip(), typed[sign.end() :].strip()


def find_tags(signs: str, where: str) -> list[tuple[str, int, int]]:
    """Names in brackets with the start and end of the brackets.

    Args:
        signs: plain text.
        where: the line, the first words of a message.

    Raises:
        ValueError: brackets that do not pair up, or nothing between them.
    """
    tags = [(tag_name(match[1]), *match.span()) for match in _TAG.finditer(signs)]
    if re.search(r"[\[\]]", _TAG.sub("", signs)):
        raise ValueError(
            f"{where}: a bracket without its partner in {shorten(signs)}. Write names as [Name]; brackets are for "
            "nothing else."
        )
    if not all(name for name, *_ in tags):
        raise ValueError(f"{where}: brackets without a name in {shorten(signs)}. Write the name between them: [Name].")
    return tags


def tag_name(text: str) -> str:
    """One spelling of a name: full-width letters as usual ones, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def fill(text: str, tags: list[tuple[str, int, int]], words: dict[str, str]) -> str:
    """The text with its tags replaced, and spaces where a replacement would stick to its neighbours.

    Args:
        text: plain or typed.
        tags: of `find_tags`.
        words: what replaces each name.
    """
    filled, position = "", 0
    for name, start, end in tags:
        filled = _join(_join(filled, text[position:start]), words[name])
        position = end
    return " ".join(_join(filled, text[position:]).split())


def _join(left: str, right: str) -> str:
    if not left or not right:
        return left + right
    # Chinese, Japanese and Korean words follow each other without a space.
    wide = all(unicodedata.east_asian_width(sign) in "WF" for sign in (left[-1], right[0]))
    touching = left[-1].isspace() or right[0].isspace() or left[-1] in _BEFORE_SPACE or right[0] in _AFTER_SPACE
    return left + right if wide or touching else f"{left} {right}"


def shorten(text: str, length: int = 60) -> str:
    """A quote of a line for a message."""
    return repr(text if len(text) <= length else f"{text[: length - 3]}...")
