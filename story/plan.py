"""In which order a story's panels are drawn, and which of them are the references of whom.

The order is that of StoryDiffusion's low-memory generation (Zhou et al. 2024, arXiv 2405.01434; repository
HVision-NKU/StoryDiffusion): the references of one character are drawn together and fill its bank, then every other
panel is drawn alone and attends to the banks of those in it.
"""

import dataclasses
from collections.abc import Collection
from typing import Literal

from .lines import shorten
from .script import Character, Panel, Story


@dataclasses.dataclass(frozen=True)
class Pass:
    """Panels that are drawn in one go.

    Args:
        mode: "write": the panels see each other and fill the bank of the one character. "read": the panel attends to
            the banks of the characters; without characters it is drawn by itself.
        characters: names.
        panels: indices among the story's panels; every panel is in exactly one pass of a plan.
    """

    mode: Literal["write", "read"]
    characters: tuple[str, ...]
    panels: tuple[int, ...]


def plan(story: Story, id_panels: int, known: Collection[str] = ()) -> tuple[Pass, ...]:
    """The passes that draw a story.

    The references of a character are the first `id_panels` panels that show only this character. Characters who never
    appear need none.

    Args:
        story: of `parse_story`.
        id_panels: references per character, 1 or more.
        known: names of characters whose bank is there already: they need no references and all their panels read.

    Returns:
        One write pass per character in the order of the characters text, then one read pass per other panel in order.

    Raises:
        ValueError: id_panels below 1, too few references for a character, or, for a story of one character without a
            name, [NC] among the first `id_panels` panels.
    """
    if id_panels < 1:
        raise ValueError(f"id_panels is {id_panels}. Choose 1 or more, the number of reference panels per character.")
    writes = []
    for character in story.characters:
        appears = [panel for panel in story.panels if character.name in panel.characters]
        if not appears or character.name in known:
            continue
        if not story.named:
            _check_leading(story.panels[:id_panels], id_panels)
        alone = [panel for panel in appears if panel.characters == (character.name,)]
        if len(alone) < id_panels:
            raise ValueError(_too_few(story, character, alone, len(appears), id_panels))
        writes.append(Pass("write", (character.name,), tuple(panel.index for panel in alone[:id_panels])))
    written = {index for step in writes for index in step.panels}
    reads = (Pass("read", panel.characters, (panel.index,)) for panel in story.panels if panel.index not in written)
    return (*writes, *reads)


def describe(story: Story, id_panels: int, known: Collection[str] = ()) -> str:
    """The plan in words: what every panel is, with its prompt and caption, and the negative prompt.

    Args:
        story: of `parse_story`.
        id_panels: as of `plan`.
        known: as of `plan`.

    Raises:
        ValueError: as of `plan`.
    """
    steps = plan(story, id_panels, known)
    roles = {index: step for step in steps for index in step.panels}
    references = {step.characters[0]: step.panels for step in steps if step.mode == "write"}
    shown = {name for panel in story.panels for name in panel.characters}
    parts = [_title(story)]
    for character in story.characters:
        if character.name not in shown:
            role = "in no panel"
        elif character.name in references:
            numbers = [index + 1 for index in references[character.name]]
            role = f"drawn first, together: {_numbers('panel', numbers)}"
        else:
            role = "from the character bank"
        parts.append(f"{_bracket(story, character.name)} {character.description}: {role}")
    for panel in story.panels:
        parts.append(_describe_panel(story, panel, roles[panel.index]))
    return "\n".join([*parts, _negative(story)])


def outline(story: Story) -> str:
    """What was understood of a script, before anything is drawn: who is in it, and every panel."""
    parts = [_title(story)]
    for character in story.characters:
        numbers = [panel.index + 1 for panel in story.panels if character.name in panel.characters]
        role = f"in {_numbers('panel', numbers)}" if numbers else "in no panel"
        parts.append(f"{_bracket(story, character.name)} {character.description}: {role}")
    for panel in story.panels:
        names = " and ".join(_bracket(story, name) for name in panel.characters)
        parts.append(_panel_text(story, panel, names or "no character"))
    return "\n".join([*parts, _negative(story)])


def _describe_panel(story: Story, panel: Panel, step: Pass) -> str:
    names = " and ".join(_bracket(story, name) for name in step.characters)
    if step.mode == "write":
        role = f"reference of {names}"
    else:
        role = f"with {names} as in the references" if names else "no character"
    return _panel_text(story, panel, role)


def _panel_text(story: Story, panel: Panel, role: str) -> str:
    caption = f"\n    caption: {panel.caption}" if panel.caption else ""
    return f"Panel {panel.index + 1} (line {panel.line}): {role}\n    prompt: {story.prompt(panel)}{caption}"


def _title(story: Story) -> str:
    return f"{_count(len(story.panels), 'panel')}, style {story.style.name}"


def _negative(story: Story) -> str:
    return f"Negative prompt: {story.negative or 'none'}"


def _bracket(story: Story, name: str) -> str:
    return f"[{name}]" if story.named else f"the {name}"


def _check_leading(panels: tuple[Panel, ...], id_panels: int) -> None:
    """Refuse [NC] where a story without names has its references."""
    for panel in panels:
        if panel.no_character:
            lower = f", or lower id_panels to {panel.index}" if panel.index else ""
            raise ValueError(
                f"Panels, line {panel.line}: [NC] {shorten(panel.text)} shows no character, but the first "
                f"{_count(id_panels, 'panel')} (id_panels) must be references of the character. Move this line "
                f"further down{lower}."
            )


def _too_few(story: Story, character: Character, alone: list[Panel], appearing: int, id_panels: int) -> str:
    if story.named:
        who, only = f"Character [{character.name}] (characters, line {character.line})", f" only [{character.name}]"
        found = f"appears in {_count(appearing, 'panel')}, {len(alone)} of them without others"
    else:
        who, only, found = "The main character", " the main character", f"appears in {_count(appearing, 'panel')}"
    lines = f" ({_numbers('line', [panel.line for panel in alone])})" if alone else ""
    lower = f"Lower id_panels to {len(alone)}, or add" if alone else "Add"
    missing = _count(id_panels - len(alone), "panel")
    return (
        f"{who} {found}{lines}, but id_panels asks for {id_panels} as references. {lower} {missing} with{only}, or "
        "connect a saved character bank."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _numbers(noun: str, numbers: list[int]) -> str:
    return f"{noun if len(numbers) == 1 else f'{noun}s'} {', '.join(map(str, numbers))}"
