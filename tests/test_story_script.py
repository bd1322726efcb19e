"""Story scripts and their plans against the published parser's results, an independent schedule, and odd texts."""

import dataclasses
import json
import random
import re
from pathlib import Path

import pytest

from consistent_video.story.plan import Pass, describe, plan
from consistent_video.story.script import MAIN_CHARACTER, MAX_PANELS, parse_story
from consistent_video.story.styles import DEFAULT_STYLE, STYLES, Style, find_style

GOLDENS = Path(__file__).parent / "goldens" / "storydiffusion_A"
CASES = json.loads((GOLDENS / "prompt_cases.json").read_text(encoding="utf-8"))
TWICE, FEW, LEADING_NC, COMMENTS, SINGLE = CASES
NONE = "(No style)"
TWO = "[Bob] a man\n[Eve] a tall woman"


def read(panels: str, characters: str = TWO, style: str = NONE, negative: str = ""):
    return parse_story(characters, panels, style, negative)


def panel(line: str, characters: str = TWO):
    (only,) = read(line, characters).panels
    return only


def of_case(case: dict, **changes):
    case = case | changes
    return parse_story(case["general_prompt"], case["prompt_array"], case["style"], case["negative"])


def single_spaced(text: str) -> str:
    return " ".join(text.split())


def without_brackets(text: str) -> str:
    return text.translate(str.maketrans("", "", "[]"))


def steps_of(case: dict) -> tuple[Pass, ...]:
    return tuple(
        Pass(step["mode"], tuple(map(without_brackets, step["character"])), tuple(step["panels"]))
        for step in case["schedule"]
    )


# The published parser's cases


@pytest.mark.parametrize("case", [TWICE, FEW], ids=["duplicate name", "too few references"])
def test_what_the_published_parser_refuses_is_refused(case):
    assert case["error"]
    with pytest.raises(ValueError, match=r"\[A\]"):
        plan(of_case(case), case["id_length"])


def test_characters_panels_and_schedule_are_the_published_ones():
    # Three differences: a line without a name is no silent comment, an unknown style is not replaced by the default,
    # and a comment starts at the first "#", so that none of it reaches a prompt.
    for change in ({"style": NONE}, {"general_prompt": COMMENTS["general_prompt"].partition("\n")[0]}):
        with pytest.raises(ValueError, match="line 2: 'no bracket line'|Unknown style"):
            of_case(COMMENTS, **change)
    story = of_case(COMMENTS, style=NONE, general_prompt=COMMENTS["general_prompt"].replace("\n", "\n#"))
    names = [f"[{character.name}]" for character in story.characters]
    assert names == COMMENTS["character_list"]
    cut = [COMMENTS["character_dict"][name].partition("#")[0].strip() for name in names]
    assert [character.description for character in story.characters] == cut == ["a man"]
    assert [panel.text for panel in story.panels] == COMMENTS["prompts"]
    assert [panel.index for panel in story.panels if panel.no_character] == COMMENTS["nc_indexs"]
    shown = {name: [panel.index for panel in story.panels if name[1:-1] in panel.characters] for name in names}
    assert shown == COMMENTS["character_index_dict"]
    inverse = {str(panel.index): [f"[{name}]" for name in panel.characters] for panel in story.panels}
    assert {index: found for index, found in inverse.items() if found} == COMMENTS["invert_character_index_dict"]
    replaced = [single_spaced(text.replace("#c1", "")) for text in COMMENTS["replace_prompts"]]
    assert [panel.prompt for panel in story.panels] == replaced == ["a man x a man y", "z"]
    steps = plan(story, COMMENTS["id_length"])
    assert steps == steps_of(COMMENTS)
    written = {f"[{name}]": list(step.panels) for step in steps if step.mode == "write" for name in step.characters}
    assert written == COMMENTS["ref_indexs_dict"] and written["[A]"] == COMMENTS["ref_totals"]
    assert list(story.captions) == [without_brackets(caption) for caption in COMMENTS["captions"]]


@pytest.mark.parametrize("case", [LEADING_NC, SINGLE])
def test_captions_are_the_published_ones_with_plain_names(case):
    assert list(of_case(case).captions) == [single_spaced(without_brackets(text)) for text in case["captions"]]


def test_a_panel_without_a_character_may_come_first_in_a_story_with_names():
    # The published parser refuses [NC] among the first id_length lines even though no reference is looked for there.
    assert LEADING_NC["error"]
    steps = plan(of_case(LEADING_NC), LEADING_NC["id_length"])
    assert steps == (Pass("write", ("A",), (1,)), Pass("read", (), (0,)), Pass("read", ("A",), (2,)))


def test_one_description_stands_before_every_panel_with_the_character():
    story = of_case(SINGLE)
    assert [panel.prompt for panel in story.panels] == ["a girl img, run", "jump"]
    assert [panel.no_character for panel in story.panels] == [False, True]
    assert not story.named and story.panels[0].characters == (MAIN_CHARACTER,)
    assert plan(story, 1) == (Pass("write", (MAIN_CHARACTER,), (0,)), Pass("read", (), (1,)))


# Plans


def published_schedule(count: int, shown: list[list[str]], names: list[str]) -> list[tuple[str, list[str], list[int]]]:
    """The low-memory generation's order, from raw lists: what is in each panel, and the names in order."""
    writes = [
        ("write", [name], [index for index, found in enumerate(shown) if found == [name]][:count]) for name in names
    ]
    done = sum((indices for _, _, indices in writes), [])
    reads = [
        ("read", [name for name in names if name in found], [index])
        for index, found in enumerate(shown)
        if index not in done
    ]
    return writes + reads


@pytest.mark.parametrize("seed", range(40))
def test_plans_of_random_stories_follow_the_published_order(seed):
    draw = random.Random(seed)
    names = draw.sample(["Ann", "Bob", "Cy", "Dee"], draw.randint(1, 4))
    count = draw.randint(1, 3)
    shown = [[name] for name in names for _ in range(count)]
    shown += [sorted(draw.sample(names, draw.randint(0, len(names)))) for _ in range(8)]
    draw.shuffle(shown)
    lines = [" and ".join(f"[{name}]" for name in found) + " outside" for found in shown]
    story = read("\n".join(lines), "\n".join(f"[{name}] person {name}" for name in names))
    steps = plan(story, count)
    assert [(step.mode, list(step.characters), list(step.panels)) for step in steps] == published_schedule(
        count, shown, names
    )
    assert sorted(index for step in steps for index in step.panels) == list(range(len(shown)))


def test_a_known_character_needs_no_references():
    story = read("[Bob] and [Eve]\n[Eve] runs\n[Eve] sits")
    assert plan(story, 2, known=["Bob", "Someone else"]) == (
        Pass("write", ("Eve",), (1, 2)),
        Pass("read", ("Bob", "Eve"), (0,)),
    )
    single = read("runs\n[NC] sky", "a man")
    assert [step.mode for step in plan(single, 4, known=[MAIN_CHARACTER])] == ["read", "read"]


def test_a_character_may_appear_nowhere():
    assert plan(read("[Bob] runs\nrain"), 1) == (Pass("write", ("Bob",), (0,)), Pass("read", (), (1,)))
    assert plan(read("rain\n[NC] sun"), 3) == (Pass("read", (), (0,)), Pass("read", (), (1,)))
    assert plan(read("[NC] rain\n[NC] sun", "a man"), 3) == (Pass("read", (), (0,)), Pass("read", (), (1,)))


def test_names_in_a_panel_follow_the_characters_text():
    assert panel("[Eve] waves at [Bob] and [Eve]").characters == ("Bob", "Eve")


@pytest.mark.parametrize(
    "characters, panels, id_panels, message",
    [
        (TWO, "[Bob] runs", 0, r"id_panels is 0\. Choose 1 or more"),
        (
            TWO,
            "\n[Bob] runs\n[Bob] and [Eve]\n\n[Bob] sits\n[Bob] naps",
            4,
            r"\[Bob\] \(characters, line 1\) appears in 4 panels, 3 of them without others \(lines 2, 5, 6\), but "
            r"id_panels asks for 4 as references\. Lower id_panels to 3, or add 1 panel with only \[Bob\], or connect",
        ),
        (
            TWO,
            "[Bob] runs\n[Bob] and [Eve]",
            1,
            r"\[Eve\] \(characters, line 2\) appears in 1 panel, 0 of them without others, .* Add 1 panel with only",
        ),
        ("a man", "run\njump", 4, r"main character appears in 2 panels \(lines 1, 2\), .* to 2, or add 2 panels with"),
        (
            "a man",
            "run\n\n[NC] sky\nsit",
            2,
            r"line 3: \[NC\] 'sky' .* the first 2 panels .* or lower id_panels to 1\.",
        ),
        ("a man", "[NC] sky\nsit", 1, r"line 1: \[NC\] 'sky' .* the first 1 panel \(.* Move this line further down\.$"),
    ],
)
def test_a_story_without_enough_references_is_refused(characters, panels, id_panels, message):
    with pytest.raises(ValueError, match=message):
        plan(read(panels, characters), id_panels)


def test_the_plan_is_described():
    text = describe(
        read("[Bob] runs\n[Bob] and [Eve] talk #Hello\n[NC] sky #", TWO + "\n[Cy] a cat", "Line art", "ugly"),
        1,
        ["Eve"],
    )
    template = STYLES["Line art"]
    assert text == "\n".join(
        (
            "3 panels, style Line art",
            "[Bob] a man: drawn first, together: panel 1",
            "[Eve] a tall woman: from the character bank",
            "[Cy] a cat: in no panel",
            "Panel 1 (line 1): reference of [Bob]",
            f"    prompt: {template.apply('a man runs')}",
            "    caption: Bob runs",
            "Panel 2 (line 2): with [Bob] and [Eve] as in the references",
            f"    prompt: {template.apply('a man and a tall woman talk')}",
            "    caption: Hello",
            "Panel 3 (line 3): no character",
            f"    prompt: {template.apply('sky')}",
            f"Negative prompt: {template.negative}, ugly",
        )
    )
    lines = describe(read("run\njump\nsit", "a man"), 2).splitlines()
    assert lines[1] == "the main character a man: drawn first, together: panels 1, 2"
    assert lines[-1] == "Negative prompt: none"


# Text


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"], ids=["unix", "windows", "old mac"])
def test_line_ends_byte_order_mark_and_tabs_do_not_matter(ending):
    characters = ending.join(("\ufeff", "[Bob]\ta  man\t", "", "  [Eve] a tall\twoman"))
    story = read(ending.join(("\ufeff\t[Bob]\truns ", " \t ", "", "[Eve] sits")), characters)
    assert [(found.name, found.description, found.line) for found in story.characters] == [
        ("Bob", "a man", 2),
        ("Eve", "a tall woman", 4),
    ]
    assert [(found.index, found.line, found.prompt, found.caption) for found in story.panels] == [
        (0, 1, "a man runs", "Bob runs"),
        (1, 4, "a tall woman sits", "Eve sits"),
    ]
    with pytest.raises(ValueError, match="Panels, line 4: unknown"):
        read(ending.join(("[Bob] runs", "", "", "[Rob] sits")))


@pytest.mark.parametrize("quotes", ['""', "''", "“”", "‘’", "„“", "＂＂"])
def test_quotes_around_a_line_are_dropped(quotes):
    opening, closing = quotes
    line = f"{opening}[Bob] doesn't run{closing}"
    story = read(f"{line}\n{line} # Fine", f"{opening}[Bob] a man{closing} # notes")
    assert [found.prompt for found in story.panels] == ["a man doesn't run"] * 2
    assert story.captions == ("Bob doesn't run", "Fine")


def test_other_quotes_stay_and_are_straight_in_prompts_only():
    found = panel("“Stop” says [Bob]’s sign, “now” # “Stop!” he’d say")
    assert found.prompt == '"Stop" says a man\'s sign, "now"'
    assert found.caption == "“Stop!” he’d say"
    assert panel("“Stop” reads [Bob], “now”").caption == "“Stop” reads Bob, “now”"


@pytest.mark.parametrize("brackets", ["[]", "【】", "［］"])
@pytest.mark.parametrize("sign", "#＃")
def test_full_width_signs_count_as_the_usual_ones(brackets, sign):
    left, right = brackets
    story = read(
        f"{left}小明{right}在跑步 {sign}【跑】\n{left}NC{right}下雨 {sign} 雨\n{left}小明{right}在睡觉",
        f"{left}小明{right}一个男孩 {sign} 备注",
    )
    assert [(found.name, found.description) for found in story.characters] == [("小明", "一个男孩")]
    assert [found.prompt for found in story.panels] == ["一个男孩在跑步", "下雨", "一个男孩在睡觉"]
    assert story.captions == ("【跑】", "雨", "小明在睡觉")
    assert [found.text for found in story.panels] == ["[小明]在跑步", "下雨", "[小明]在睡觉"]
    assert plan(story, 1)[0] == Pass("write", ("小明",), (0,))


@pytest.mark.parametrize("tag", ["[NC]", "[nc]", "[ NC ]", "【NC】", "［ＮＣ］"])
def test_no_character_is_found_in_every_spelling_and_place(tag):
    for line in (f"{tag} blue sky", f"blue {tag} sky", f"blue sky{tag}", f"“blue sky” {tag}", f"blue sky # {tag} sky"):
        for characters in (TWO, "a man"):
            found = panel(line, characters)
            assert found.no_character and found.characters == () and found.prompt == "blue sky"
            assert found.caption in ("blue sky", "sky")


def test_names_match_in_every_width_and_spacing():
    assert panel("[ Old  Ｂｏｂ ] runs", "[Old Bob] a man").characters == ("Old Bob",)
    assert panel("[O’Brien] runs", "[O'Brien] a man").prompt == "a man runs"
    # One name may start another: tags are whole names.
    story = read("[Ann]\n[Ann Lee]\n[Anna]", "[Ann] a\n[Ann Lee] b\n[Anna] c")
    assert [found.prompt for found in story.panels] == ["a", "b", "c"]


@pytest.mark.parametrize(
    "line, prompt, caption",
    [
        ("[Bob], [Eve].", "a man, a tall woman.", "Bob, Eve."),
        ("[Bob][Eve]", "a man a tall woman", "Bob Eve"),
        ("[Bob]runs", "a man runs", "Bob runs"),
        ("the dog of[Bob](happy)", "the dog of a man (happy)", "the dog of Bob (happy)"),
        ("([Bob]:1.2) {a|b} {prompt}", "(a man:1.2) {a|b} {prompt}", "(Bob:1.2) {a|b} {prompt}"),
        ("[Bob] at #1 # x", "a man at #1", "x"),
        ("[Bob] sits #", "a man sits", ""),
        ("[Bob] # \t he \t is  [Bob] ", "a man", "he is [Bob]"),
        ("[Bob]和[Eve]在跑步", "a man 和 a tall woman 在跑步", "Bob 和 Eve 在跑步"),
    ],
)
def test_names_become_descriptions_in_prompts_and_plain_in_captions(line, prompt, caption):
    found = panel(line)
    assert (found.prompt, found.caption) == (prompt, caption)


def test_a_description_may_have_several_lines_comments_and_a_full_stop():
    story = read("runs", "# hero\n a young man, # note\n\nred coat.,\n")
    assert story.characters[0].description == "a young man, red coat"
    assert (story.characters[0].line, story.panels[0].prompt) == (2, "a young man, red coat, runs")


def test_descriptions_do_not_become_tags_of_others():
    """A description that quotes a style's or another panel's words is inserted once and not read again."""
    story = read("[Bob] meets [Eve]", "[Bob] {prompt}\n[Eve] Bob's aunt", "Comic book")
    assert story.panels[0].prompt == "{prompt} meets Bob's aunt"
    assert story.prompt(story.panels[0]).count("meets") == 1


@pytest.mark.parametrize(
    "characters, panels, message",
    [
        ("", "run", "characters text is empty"),
        ("\n # only a comment\n", "run", "characters text is empty"),
        ("...", "run", "Characters, line 1: the description is empty"),
        ("[Bob] a man\n[Eve] # later", "[Bob]", "Characters, line 2: the description is empty"),
        ("[Bob] a man\n\n[ Ｂob] a boy", "[Bob]", r"Characters, line 3: \[Bob\] is described in line 1 already"),
        ("[Bob] a man\nEve a woman", "[Bob]", "Characters, line 2: 'Eve a woman' does not start with a name"),
        ("a man [Bob]", "run", "Characters, line 1: .* does not start with a name"),
        ("[Bob a man", "run", r"Characters, line 1: a bracket without its partner in '\[Bob a man'"),
        ("Bob] a man", "run", "Characters, line 1: a bracket without its partner"),
        ("[[Bob]] a man", "run", "Characters, line 1: a bracket without its partner"),
        ("[ ] a man", "run", "Characters, line 1: brackets without a name"),
        ("[Bob] a man with [Eve]", "run", r"Characters, line 1: a second name, \[Eve\], in the description of \[Bob\]"),
        ("[nc] a man", "run", r"Characters, line 1: \[nc\] has a meaning of its own"),
        (f"[{MAIN_CHARACTER}] a man", "run", "has a meaning of its own"),
        (TWO, "", "panels text has no panels"),
        (TWO, "\n \t\n\ufeff", "panels text has no panels"),
        (
            TWO,
            "[Bob]\n\n[bobb] runs",
            r"line 3: unknown character \[bobb\] in '\[bobb\] runs'\. Did you mean \[Bob\]\?",
        ),
        (TWO, "[Xyz] runs", r"unknown character \[Xyz\] in '\[Xyz\] runs'\. The characters are \[Bob\], \[Eve\]\."),
        (TWO, "x" * 99 + "[Q]", r"unknown character \[Q\] in 'x{57}\.\.\.'"),
        (TWO, "[Bob] runs\n[Bob sits", r"Panels, line 2: a bracket without its partner in '\[Bob sits'"),
        (TWO, "Bob] runs", "Panels, line 1: a bracket without its partner"),
        (TWO, "【Bob runs", "Panels, line 1: a bracket without its partner"),
        (TWO, "[Bob #runs]", "Panels, line 1: a bracket without its partner"),
        (TWO, "[] runs", "Panels, line 1: brackets without a name"),
        (TWO, "[NC] [Bob] runs", r"Panels, line 1: .* has \[NC\], .* and \[Bob\]\. Remove one"),
        (TWO, "[Bob]\n# Chapter two", "Panels, line 2: '# Chapter two' says nothing about the picture"),
        (TWO, "[NC]", "Panels, line 1: .* says nothing about the picture"),
        ("a man", "# Chapter one", "Panels, line 1: '# Chapter one' says nothing about the picture"),
        ("a man", "run\n[Bob] runs", r"Panels, line 2: \[Bob\] in .* one description without a name\. Start that text"),
        ("a man", "run\n[Bob runs", "Panels, line 2: a bracket without its partner"),
    ],
)
def test_a_line_that_does_not_follow_the_format_is_named(characters, panels, message):
    with pytest.raises(ValueError, match=message):
        read(panels, characters)


def test_a_long_story_is_read_up_to_a_limit_and_then_told_where_to_cut():
    lines = ["[Bob] runs", ""] * MAX_PANELS
    story = read("\n".join(lines))
    assert len(story.panels) == len(plan(story, 4)) + 3 == MAX_PANELS == 100
    with pytest.raises(
        ValueError, match=r"has 101 panels; .* at most 100\. Cut it before line 201, save the character"
    ):
        read("\n".join([*lines, "[Bob] sits", ""]))


# Styles


def test_the_published_style_names_are_all_there():
    assert list(STYLES) == [
        "(No style)",
        "Japanese Anime",
        "Digital/Oil Painting",
        "Pixar/Disney Character",
        "Photographic",
        "Comic book",
        "Line art",
        "Black and White Film Noir",
        "Isometric Rooms",
    ]
    assert DEFAULT_STYLE == "Japanese Anime" and all(name == style.name for name, style in STYLES.items())
    assert STYLES[NONE] == Style(NONE, "{prompt}", "")


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_templates_hold_one_prompt_and_no_weights(style):
    assert style.positive.count("{prompt}") == 1 and re.findall(r"[{}]", style.positive) == ["{", "}"]
    # No groups that ComfyUI would read as weights, so an unmatched parenthesis of a panel cannot close one.
    assert not re.search(r"[()\[\]\n]", style.positive + style.negative)
    assert len((style.positive + " ").split(",")) <= 7 and single_spaced(style.positive) == style.positive
    assert style.apply("(a man:1.3) {prompt} \\1") == "(a man:1.3) {prompt} \\1".join(style.positive.split("{prompt}"))


@pytest.mark.parametrize("name", STYLES)
def test_the_negative_prompt_holds_the_style_and_the_user_once(name):
    story = read("[Bob] and [Eve]\n[Eve]\n[Bob]", TWO, name, " three legs\n")
    style = STYLES[name]
    assert story.negative == (f"{style.negative}, three legs" if style.negative else "three legs")
    assert story.negative.count("three legs") == 1 and story.negative.count(style.negative or "three legs") == 1
    assert dataclasses.replace(story, user_negative="").negative == style.negative
    assert story.prompt(story.panels[2]) == style.positive.replace("{prompt}", "a man")


def test_unknown_styles_are_refused_with_the_names():
    with pytest.raises(
        ValueError, match=r"Unknown style 'Comic Book'\. Did you mean 'Comic book'\? .* Isometric Rooms"
    ):
        read("[Bob]", style="Comic Book")
    with pytest.raises(ValueError, match=r"Unknown style ''\. Choose one of: \(No style\), Japanese Anime"):
        find_style("")


@pytest.mark.parametrize("positive", ["a man", "{prompt} and {prompt}"])
def test_a_style_needs_one_place_for_the_prompt(positive):
    with pytest.raises(ValueError, match="Style 'Mine' has [02] times {prompt}"):
        Style("Mine", positive)


def test_stories_cannot_be_changed():
    story = read("[Bob] runs")
    for thing in (story, story.panels[0], story.characters[0], story.style, plan(story, 1)[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, dataclasses.fields(thing)[0].name, None)
        hash(thing)
