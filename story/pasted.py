"""Pasted scripts -> plain lines: what a list, a chat or a program put around the lines is taken away.

That are numbers, bullets and titles such as "Panel 1:", the quotes and commas of a programming language's list, and
semicolons between panels. A mark is taken away where nothing else can be meant: a number in front of a line, for
example, when the numbers count the lines.
"""

import re
from collections.abc import Sequence

from .lines import Line, caption_sign, plain, unquote

_TEXT = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
_COMMA = "[,\uff0c\u3001]"
# One or several texts of a list, with what may stand around them: `prompts = ["a", "b"],`
_ENTRIES = re.compile(rf"(?:\w+\s*=\s*)?[\[(]?\s*{_TEXT}(?:\s*{_COMMA}\s*{_TEXT})*\s*[\])]?\s*(?:{_COMMA}|;)?")
_LIST_EDGE = re.compile(r"(?:\w+\s*=\s*)?[\[(]|[\])][,;]?")
_SEMICOLON = re.compile(r";(?=\s|\[|$)|\uff1b")

_COUNT = r"(?:\d{1,3}|[\u4e00\u4e8c\u4e09\u56db\u4e94\u516d\u4e03\u516b\u4e5d\u5341]{1,3})"
_END = r"\s*[.:)\-\u2013\u2014\uff1a\uff0e\uff09\u3001]"
# "Panel 1:", in Chinese "\u7b2c1\u683c\uff1a" and "\u5206\u955c1\uff1a".
_TITLE = re.compile(
    r"(?:panel|scene|frame|shot|picture|image|page|step)\s*#?\d{1,3}"
    rf"(?:{_END}|(?=\s*\[)|\s*$)"
    rf"|\u7b2c\s*{_COUNT}\s*[\u683c\u5e55\u9875\u5f20\u955c\u573a\u5e27](?:{_END}|\s|$)"
    rf"|(?:\u5206\u955c|\u753b\u9762|\u573a\u666f|\u955c\u5934)\s*{_COUNT}(?:{_END}|\s*$)",
    re.IGNORECASE,
)
# A sign, then the mark of a Markdown task; dashes and stars need a space, because words may begin with them.
_BULLET = re.compile(
    r"(?:[-*+\u2013\u2014](?=\s|\[)|[\u2022\u2023\u25aa\u25cf\u25cb\u25a0\u25a1\u25ba\u25b6\u25e6\u00b7\u30fb])\s*"
    r"(?:\[[ xX]\]\s+)?"
)
# Circled digits and the digits of keycap emoji.
_CIRCLED = re.compile(r"(?:[\u2460-\u2473\u2776-\u277f]|\d\ufe0f?\u20e3)\s*")
_EMPHASIS = re.compile(r"(?<![\w*])(\*{1,2})(?=[^\s*])([^*]+?)(?<=\S)\1(?![\w*])")
_HEADING = re.compile(r"#{1,6}\s+(?=\S)")
# Ways to number lines, the surest first: with a space or a bracket after the number, without.
_NUMBER = re.compile(
    rf"#?[(\uff08]?(\d{{1,3}})(?:{_END}(?=\s|\[|[\"'(]|[^\x00-\x7f]|$)|(?<=^#\d)(?=\s)|(?<=^#\d\d)(?=\s))"
)
_TIGHT_NUMBER = re.compile(rf"(\d{{1,3}}){_END}(?!\d)")
_LETTER = re.compile(r"([A-Za-z])[.)]\s+")
_LOOSE_ENDS = " \t,;\uff0c\uff1b\u3001"


def script_lines(lines: Sequence[Line], panels: bool = True) -> list[Line]:
    """Lines without list marks; a line that held several entries becomes several lines of the same number.

    Args:
        lines: of `lines.numbered_lines`.
        panels: whether they are panels, else characters; semicolons in the description of a character stay.
    """
    lines = _without_emphasis(lines)
    lines = _without_marks(_entries(lines))
    lines = _split(_entries(lines), panels)
    if panels:
        lines = [(number, _without_loose_end(line)) for number, line in lines]
    return [(number, line) for number, line in lines if line]


def _entries(lines: Sequence[Line]) -> list[Line]:
    """The texts of lists in quotes, each as a line; other lines as they are."""
    rows = [_entry_texts(line) for _, line in lines]
    if not any(rows):
        return list(lines)
    found = []
    for (number, line), texts in zip(lines, rows):
        if not texts and _LIST_EDGE.fullmatch(plain(line).strip()):
            continue
        found += [(number, text) for text in texts or [line]]
    return found


def _entry_texts(line: str) -> list[str]:
    """What stands in the quotes of a line that has only list entries, with a comment after them as the caption."""
    signs = plain(line)
    match = _ENTRIES.match(signs)
    rest = signs[match.end() :].strip() if match else ""
    if not match or (rest and not rest.startswith("#")) or unquote(line) != line.strip():
        return []
    spans = [found.span() for found in re.finditer(_TEXT, signs[: match.end()])]
    texts = [re.sub(r"\\(.)", r"\1", line[start + 1 : end - 1]).strip() for start, end in spans]
    if rest and len(texts) == 1:
        texts = [f"{texts[0]} {rest}"]
    return texts


def _without_emphasis(lines: Sequence[Line]) -> list[Line]:
    """Without Markdown's signs of emphasis, and its heading signs before a title or a number."""
    plainer = []
    for number, line in lines:
        line = _EMPHASIS.sub(r"\2", line)
        heading = _HEADING.match(plain(line))
        if heading and (_TITLE.match(plain(line), heading.end()) or _NUMBER.match(plain(line)[heading.end() :])):
            line = line[heading.end() :]
        plainer.append((number, line))
    return plainer


def _without_marks(lines: Sequence[Line]) -> list[Line]:
    """Without titles, bullets and numbers; a line that was nothing but a title is left out."""
    bare = []
    for number, line in lines:
        for mark in (_TITLE, _BULLET, _CIRCLED):
            match = mark.match(plain(line))
            if match:
                line = line[match.end() :].strip()
                break
        if line:
            bare.append((number, line))
    for mark, counts, loose in ((_NUMBER, int, True), (_TIGHT_NUMBER, int, False), (_LETTER, ord, False)):
        matches = [mark.match(plain(line)) for _, line in bare]
        if _count_lines([counts(match[1]) if match else None for match in matches], loose):
            return [
                (number, line[match.end() :].strip() if match else line) for (number, line), match in zip(bare, matches)
            ]
    return bare


def _count_lines(numbers: list[int | None], loose: bool) -> bool:
    """Whether numbers before lines count them.

    They do when they go up by one, or, where the form is sure (`loose`), when all lines or the line of that place
    have one.
    """
    found = [number for number in numbers if number is not None]
    rising = all(second == first + 1 for first, second in zip(found, found[1:]))
    if not loose:
        return len(found) == len(numbers) > 1 and rising
    if len(found) < 2:
        return bool(found) and found[0] == numbers.index(found[0]) + 1
    return rising or len(found) == len(numbers)


def _split(lines: Sequence[Line], panels: bool) -> list[Line]:
    """Semicolons end a panel where each part begins with a name, or where one line holds the whole story."""
    found = []
    for number, line in lines:
        parts = _parts(plain(line), line)
        named = all(part.startswith(("[", "\u3010", "\uff3b")) for part in parts)
        captions = [caption_sign(plain(part)) is not None for part in parts]
        alone = panels and len(lines) == 1 and "[" not in plain(line) and len(set(captions)) == 1
        found += [(number, part) for part in parts] if len(parts) > 1 and (named or alone) else [(number, line)]
    return found


def _parts(signs: str, line: str) -> list[str]:
    edges = [0, *(edge for match in _SEMICOLON.finditer(signs) for edge in match.span()), len(line)]
    return [part for start, end in zip(edges[::2], edges[1::2]) if (part := line[start:end].strip())]


def _without_loose_end(line: str) -> str:
    """Without commas and semicolons at the end, unless they end a caption."""
    return unquote(line if caption_sign(plain(line)) else line.rstrip(_LOOSE_ENDS))
