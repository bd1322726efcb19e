"""The script of a picture story: typed characters and panels -> prompts, captions, and who is in which panel.

The formats are those of StoryDiffusion's demos (Zhou et al. 2024, arXiv 2405.01434; repository
HVision-NKU/StoryDiffusion), for one described character and for several named ones.
"""

import dataclasses
import difflib
import re
from collections.abc import Collection

from .lines import (
    Line,
    caption_sign,
    fill,
    find_tags,
    numbered_lines,
    plain,
    shorten,
    split_at,
    take_no_character,
    unquote,
)
from .names import explain_forgotten, forgotten_name, in_use, mark_names, split_name
from .pasted import script_lines
from .styles import Style, find_style

# Name of the one character that is described without a name.
MAIN_CHARACTER = "main character"
# All pictures of a story end in one batch: 100 of 1024x1024 are 1.3 GB.
MAX_PANELS = 100


@dataclasses.dataclass(frozen=True)
class Character:
    """Someone whose looks stay the same.

    Args:
        name: without brackets; `MAIN_CHARACTER` for the one without a name.
        description: what prompts say in place of the name.
        line: in the characters text, from 1.
    """

    name: str
    description: str
    line: int


@dataclasses.dataclass(frozen=True)
class Panel:
    """One picture of a story.

    Args:
        index: among the panels, from 0.
        line: in the panels text, from 1.
        text: the line without [NC] and caption, names still in brackets.
        prompt: the text with descriptions, before the style.
        caption: may be empty.
        characters: names of those in it, in the order of the characters text.
        no_character: whether the line has [NC].
    """

    index: int
    line: int
    text: str
    prompt: str
    caption: str
    characters: tuple[str, ...]
    no_character: bool


@dataclasses.dataclass(frozen=True)
class Story:
    """A story that is ready to be drawn; see `parse_story`.

    Args:
        characters: in the order of their text.
        panels: in the order of their text.
        style: of all panels.
        user_negative: what the user wants to avoid; may be empty.
    """

    characters: tuple[Character, ...]
    panels: tuple[Panel, ...]
    style: Style
    user_negative: str = ""

    @property
    def named(self) -> bool:
        """Whether the characters have names, rather than one description for all panels."""
        return self.characters[0].name != MAIN_CHARACTER

    @property
    def negative(self) -> str:
        """The negative prompt of every panel: the style's, then the user's, each once."""
        return ", ".join(filter(None, (self.style.negative, self.user_negative)))

    @property
    def captions(self) -> tuple[str, ...]:
        """Captions of the panels in order."""
        return tuple(panel.caption for panel in self.panels)

    def prompt(self, panel: Panel) -> str:
        """A panel's prompt in the style's wording."""
        return self.style.apply(panel.prompt)


def parse_story(characters: str, panels: str, style: str, negative: str = "") -> Story:
    """Read a story.

    Blank lines are skipped, quotes around a line are dropped, and full-width or curly signs count as [ ] # " '. Marks
    of lists are dropped too (`pasted.script_lines`). Colours such as #ff8800 are not taken for a `#`.

    Args:
        characters: lines `[Name] description`, or one description without brackets (over any number of lines), which
            then stands before every panel without [NC]. Lines `Name: description` are names when the panels have them.
            A `#` starts a comment.
        panels: one per line, at most `MAX_PANELS`. `[Name]` is replaced by the description, `[NC]` says that no
            character is in the panel. The caption is what follows the last `#`, nothing if nothing follows, and the
            whole line, with plain names, if there is no `#`. Names without brackets: see `names.mark_names`.
        style: a name in `STYLES`.
        negative: added to the style's negative prompt.

    Raises:
        ValueError: a line that does not follow the format, no characters, no panels or too many, an unknown style.
    """
    cast = _parse_characters(characters, panels)
    known = {} if cast[0].name == MAIN_CHARACTER else {character.name: character for character in cast}
    lines = script_lines(list(numbered_lines(panels)))
    if not lines:
        raise ValueError("The panels text has no panels. Write one line per picture.")
    if len(lines) > MAX_PANELS:
        raise ValueError(
            f"The panels text has {len(lines)} panels; a story has at most {MAX_PANELS}. Cut it before line "
            f"{lines[MAX_PANELS][0]}, save the character bank of the first part, and load it for the next one."
        )
    parsed = (
        _parse_named(index, number, line, known)
        if known
        else _parse_described(index, number, line, cast[0].description)
        for index, (number, line) in enumerate(lines)
    )
    return Story(cast, tuple(parsed), find_style(style), negative.strip())


def _parse_characters(text: str, panels: str) -> tuple[Character, ...]:
    lines = _character_lines(text)
    if not lines:
        raise ValueError(
            "The characters text is empty. Describe the main character, or several on lines of the form '[Name] "
            "description'."
        )
    named = [split_name(line) for _, line in lines]
    bracketed = any(sign in line for _, line in lines for sign in "[]")
    if not bracketed and not in_use((found[0] for found in named if found), panels):
        number = lines[0][0]
        return (Character(MAIN_CHARACTER, _description(number, " ".join(line for _, line in lines)), number),)
    cast: dict[str, Character] = {}
    for number, line in lines:
        character = _parse_character(number, line)
        if character.name in cast:
            raise ValueError(
                f"Characters, line {number}: [{character.name}] is described in line {cast[character.name].line} "
                "already. Give each character one line and a name of its own."
            )
        cast[character.name] = character
    return tuple(cast.values())


def _character_lines(text: str) -> list[Line]:
    lines = []
    for number, line in numbered_lines(text):
        # A comment starts at the first "#"; the published parser cuts at the last one and keeps the rest of it.
        comment = caption_sign(plain(line), last=False)
        line = unquote(plain(line[: comment.start()] if comment else line))
        if line:
            lines.append((number, line))
    return script_lines(lines, panels=False)


def _parse_character(number: int, line: str) -> Character:
    where = f"Characters, line {number}"
    tags = find_tags(line, where)
    found = split_name(line)
    if found and not tags:
        line = f"[{found[0]}] {found[1]}"
        tags = find_tags(line, where)
    if not tags or tags[0][1] != 0:
        raise ValueError(
            f"{where}: {shorten(line)} does not start with a name in brackets, as other lines do. Write '[Name] "
            "description' on one line, or put # before a comment."
        )
    if len(tags) > 1:
        raise ValueError(
            f"{where}: a second name, [{tags[1][0]}], in the description of [{tags[0][0]}]. Brackets are for the name "
            "only; write one line per character."
        )
    name, _, end = tags[0]
    if name.casefold() in ("nc", MAIN_CHARACTER):
        raise ValueError(f"{where}: [{name}] has a meaning of its own. Choose another name.")
    return Character(name, _description(number, line[end:]), number)


def _description(number: int, text: str) -> str:
    """White space collapsed; without a colon or dash after the name, and without commas and full stops at the end.

    They would stand in the middle of a prompt.
    """
    description = re.sub(r"^\s*(?:[:=\uff1a]|[-\u2013\u2014]+(?=\s))", "", text)
    description = " ".join(description.split()).rstrip(" ,.;\uff0c\u3002\uff1b\u3001")
    if not description:
        raise ValueError(
            f"Characters, line {number}: the description is empty. Write what the character looks like, such as 'a "
            "girl with red hair and a green coat'."
        )
    return description


def _parse_named(index: int, number: int, line: str, known: dict[str, Character]) -> Panel:
    where = f"Panels, line {number}"
    body, caption, no_character = _split(line)
    find_tags(plain(body), where)  # brackets that do not pair up are told as they were typed
    body = mark_names(body, known)
    tags = find_tags(plain(body), where)
    forgotten = None if tags or no_character else forgotten_name(body, known)
    if forgotten:
        raise ValueError(explain_forgotten(where, line, forgotten))
    for name, *_ in tags:
        if name not in known:
            raise ValueError(
                f"{where}: unknown character [{name}] in {shorten(line)}. {_name_hint(name, known)} Correct the name, "
                "or describe the character in the characters text."
            )
    if tags and no_character:
        raise ValueError(
            f"{where}: {shorten(line)} has [NC], which says that no character is shown, and [{tags[0][0]}]. Remove "
            "one of them."
        )
    _check_drawable(where, line, body)
    descriptions = {name: character.description for name, character in known.items()}
    return Panel(
        index=index,
        line=number,
        text=plain(body),
        prompt=fill(plain(body), tags, descriptions),
        caption=fill(body, tags, {name: name for name in known}) if caption is None else caption,
        characters=tuple(name for name in known if any(name == found for found, *_ in tags)),
        no_character=no_character,
    )


def _name_hint(name: str, known: Collection[str]) -> str:
    folded = {other.casefold(): other for other in known}
    close = difflib.get_close_matches(name.casefold(), folded, n=1)
    meant = f"Did you mean [{folded[close[0]]}]? " if close else ""
    return f"{meant}The characters are {', '.join(f'[{other}]' for other in known)}."


def _parse_described(index: int, number: int, line: str, description: str) -> Panel:
    where = f"Panels, line {number}"
    body, caption, no_character = _split(line)
    tags = find_tags(plain(body), where)
    if tags:
        raise ValueError(
            f"{where}: [{tags[0][0]}] in {shorten(line)}, but the characters text is one description without a name. "
            f"Start that text with [{tags[0][0]}], or remove the brackets here."
        )
    _check_drawable(where, line, body)
    text = fill(plain(body), [], {})
    return Panel(
        index=index,
        line=number,
        text=plain(body),
        prompt=text if no_character else f"{description}, {text}",
        caption=fill(body, [], {}) if caption is None else caption,
        characters=() if no_character else (MAIN_CHARACTER,),
        no_character=no_character,
    )


def _split(line: str) -> tuple[str, str | None, bool]:
    """What is drawn, the caption (None without a #), and whether [NC] was there."""
    typed, no_character = take_no_character(line)
    typed = unquote(typed)
    sign = caption_sign(plain(typed))
    if sign is None:
        return typed, None, no_character
    body, caption = split_at(typed, sign)
    return unquote(body), " ".join(caption.split()), no_character


def _check_drawable(where: str, line: str, body: str) -> None:
    if not body:
        raise ValueError(
            f"{where}: {shorten(line)} says nothing about the picture. Write what it shows before the # and its "
            "caption, or delete the line."
        )
