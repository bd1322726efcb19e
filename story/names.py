"""Names that stand in a script without square brackets: as people write them, and where no other reading is likely.

`Mia: reads`, `(Mia and Tom) sit`, `[Mia, Tom] sit`, `Mia and Tom: sit` and `Mia sits` become `[Mia] reads` and so on.
"""

import difflib
import re
import unicodedata
from collections.abc import Collection, Iterable

from .lines import plain, shorten, tag_name

_OPENING = r"[(\[{<\uff08\uff3b\uff5b\uff1c\u3010\u3014\u3016\u300a\u3008]"
_CLOSING = r"[)\]}>\uff09\uff3d\uff5d\uff1e\u3011\u3015\u3017\u300b\u3009]"
_GROUP = re.compile(rf"(?<!\\){_OPENING}([^()\[\]{{}}<>:]{{1,120}}?){_CLOSING}")
_JOINT = re.compile(r"\s*(?:[,&+/\uff0c\u3001]|\b(?:and|with)\b|[\u548c\u4e0e\u8ddf\u53ca])\s*", re.IGNORECASE)
_COLON = "[:\uff1a]"
_LABEL = re.compile(rf"([^:\uff1a\[\]()#]{{1,60}}?)\s*{_COLON}\s*(?=\S)")
_TAGS_THEN_SIGN = re.compile(
    rf"((?:\[[^\[\]]*\](?:{_JOINT.pattern})?)+)\s*(?:{_COLON}|[-\u2013\u2014](?=\s))\s*", re.IGNORECASE
)
# A name as the first words of a characters line: `Mia: `, `Mia - `, `Mia = `, `(Mia) `.
_NAME = r"[^\W\d_][\w'\u2019.-]*(?:\s+[\w'\u2019.-]+){0,2}"
_NAMED = re.compile(
    rf"(?:({_NAME})\s*(?:{_COLON}|=)\s*|({_NAME})\s+[-\u2013\u2014]\s+"
    rf"|[({{<\uff08]\s*({_NAME})\s*[)}}>\uff09]\s*(?:{_COLON}|[-\u2013\u2014=](?=\s))?\s*)(?=\S)"
)


def mark_names(typed: str, known: Collection[str]) -> str:
    """A panel's text with every name that is meant in square brackets.

    Args:
        typed: without caption.
        known: names of the characters.

    Returns:
        The text; names that it has in square brackets already, known or not, stay as they are.
    """
    typed = _GROUP.sub(lambda match: _mark_all(match[1], known) or match[0], typed)
    label = _LABEL.match(typed)
    marked = label and _mark_all(label[1], known, fold=True)
    if marked:
        typed = f"{marked} {typed[label.end() :]}"
    typed = _mark_bare(typed, known)
    leading = _TAGS_THEN_SIGN.match(plain(typed))
    return f"{typed[: leading.end(1)].strip()} {typed[leading.end() :]}" if leading else typed


def forgotten_name(typed: str, known: Collection[str]) -> str | None:
    """A known name that a panel without names has as a word, or nearly as a label; None if there is none."""
    for name in known:
        if len(name) > 1 and _as_word(name).search(plain(typed)):
            return name
    label = _LABEL.match(typed)
    folded = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(tag_name(label[1]).casefold(), folded, n=1, cutoff=0.65) if label else []
    return folded[close[0]] if close else None


def split_name(line: str) -> tuple[str, str] | None:
    """Name and description of a characters line without square brackets; None if it has no form for that."""
    match = _NAMED.match(line)
    return (tag_name(match[1] or match[2] or match[3]), line[match.end() :]) if match else None


def in_use(names: Iterable[str], panels: str) -> bool:
    """Whether the panels text shows that at least one of some words is a name: it has it in brackets, before a colon,
    or as a word with a capital letter."""
    signs = plain(panels)
    for name in names:
        words = r"\s+".join(map(re.escape, name.split()))
        marked = rf"[\[({{<\uff08][^\[\]()]*?(?<!\w){words}(?!\w)|^\W*(?:\d+\W+)?{words}\s*{_COLON}"
        if re.search(marked, signs, re.IGNORECASE | re.MULTILINE) or (_proper(name) and _as_word(name).search(signs)):
            return True
    return False


def _mark_all(text: str, known: Collection[str], fold: bool = False) -> str | None:
    """A list of known names, such as "Mia and Tom", with each in brackets; None if it is not one."""
    if tag_name(plain(text)) in known:
        return f"[{tag_name(plain(text))}]"
    folded = {name.casefold(): name for name in known} if fold else {}
    parts = _JOINT.split(text)
    names = [tag_name(plain(part)) for part in parts]
    names = [name if name in known else folded.get(name.casefold(), "") for name in names]
    if not all(names):
        return None
    joints = [*(match[0] for match in _JOINT.finditer(text)), ""]
    return "".join(f"[{name}]{joint}" for name, joint in zip(names, joints))


def _mark_bare(typed: str, known: Collection[str]) -> str:
    """Known names with a capital letter, or of a script without capitals, that stand as words in the text."""
    tagged = {tag_name(tag) for tag in re.findall(r"\[([^\[\]]*)\]", plain(typed))}
    for name in sorted(known, key=len, reverse=True):
        if name in tagged or not _proper(name):
            continue
        word = re.compile(rf"\[[^\[\]]*\]|({_as_word(name).pattern})")
        found = [match for match in word.finditer(plain(typed)) if match[1]]
        for match in reversed(found):
            typed = f"{typed[: match.start()]}[{name}]{typed[match.end() :]}"
    return typed


def _proper(name: str) -> bool:
    """Whether a word that equals the name is hardly another word: capital letter, or a script without them."""
    return len(name) > 1 and name[0].isalpha() and not name[0].islower()


def _as_word(name: str) -> re.Pattern:
    """The name as a word of its own, not as a possessive or a part of a compound."""
    words = r"\s+".join(map(re.escape, name.split()))
    before = "" if _wide(name[0]) else r"(?<![\w\-])"
    after = "" if _wide(name[-1]) else r"(?![\w\-]|'s\b)"
    return re.compile(before + words + after)


def _wide(sign: str) -> bool:
    return unicodedata.east_asian_width(sign) in "WF"


def explain_forgotten(where: str, line: str, name: str) -> str:
    """What to do about a name of `forgotten_name`."""
    return (
        f"{where}: {shorten(line)} seems to mean the character {name}, but has no name in brackets. Write [{name}] "
        "where that character is shown, or [NC] when no character is."
    )
