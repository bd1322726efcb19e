"""Scripts as people paste them: lists, numbers, bullets, semicolons, names without brackets, colours."""

import pytest

from consistent_video.nodes.story import StoryScript
from consistent_video.story.plan import outline
from consistent_video.story.script import parse_story

NONE = "(No style)"
TWO = "[Mia] a tall woman\n[Tom] an old man"


def panels(text: str, characters: str = "a girl"):
    return [(panel.line, panel.text, panel.caption) for panel in parse_story(characters, text, NONE).panels]


def shown(text: str, characters: str = TWO):
    return [(panel.prompt, panel.characters) for panel in parse_story(characters, text, NONE).panels]


@pytest.mark.parametrize(
    "text",
    [
        "walks\nsits #Hi\neats",
        '"walks",\n"sits #Hi",\n"eats"',
        "'walks',\n'sits', # Hi\n'eats',",
        'prompts = [\n    "walks",\n    "sits #Hi",\n    "eats"\n]',
        '["walks", "sits #Hi", "eats"]',
        "“walks”，\n“sits #Hi”，\n“eats”",
        "1. walks\n2. sits #Hi\n3. eats",
        "1.walks\n2.sits #Hi\n3.eats",
        "3- walks\n4- sits #Hi\n5- eats",
        "(1) walks\n2) sits #Hi\n- eats",
        "1、walks\n2、sits #Hi\n3、eats",
        "#1 walks\n#2: sits #Hi\n#3 eats",
        "a) walks\nb) sits #Hi\nc) eats",
        "• walks\n* sits #Hi\n- [ ] eats",
        "① walks\n2️⃣ sits #Hi\n③ eats",
        "**Panel 1:** walks\nScene 2 - sits #Hi\n第三格：eats",
        "### Panel 1\nwalks\n### Panel 2\nsits #Hi\nFrame 3.\neats",
        '1. "walks",\n2. "sits #Hi",\n3. "eats"',
        "walks,\nsits #Hi\neats;",
        "\ufeff1.\u00a0walks\r\n\r\n2.\tsits ##Hi\r\n3. *eats*\r\n\r\n \r\n",
    ],
)
def test_the_marks_of_lists_are_left_out(text):
    assert [found[1:] for found in panels(text)] == [("walks", "walks"), ("sits", "Hi"), ("eats", "eats")]


def test_entries_and_titles_keep_the_line_that_they_are_on():
    assert [found[0] for found in panels('x = [\n"walks",\n\n"sits"]')] == [2, 4]
    assert [found[0] for found in panels("Panel 1:\nwalks\nPanel 2: sits")] == [2, 3]


@pytest.mark.parametrize(
    "line",
    [
        "24. December, a tree with candles",
        "3-year-old at the table",
        "2 girls at 7:30",
        "3.5 metres of snow",
        '"Stop" on a sign, "now"',
        "half-open door - a cat",
        "2 * 3 on a blackboard",
    ],
)
def test_what_is_not_a_mark_stays(line):
    assert [found[1] for found in panels(f"walks\n{line}\nsits")] == ["walks", line, "sits"]


def test_semicolons_end_panels_where_nothing_else_can_be_meant():
    assert [found[1] for found in panels("walks; sits；eats;")] == ["walks", "sits", "eats"]
    assert [found[1:] for found in panels("walks #Hi; sits #Bye")] == [("walks", "Hi"), ("sits", "Bye")]
    assert [found[1:] for found in panels("walks #Hi; you")] == [("walks", "Hi; you")]
    assert [found[1] for found in panels("walks; slowly\nsits")] == ["walks; slowly", "sits"]
    assert [found[1] for found in panels("[Mia] walks; [Tom] sits\n[Mia] eats; fast", TWO)] == [
        "[Mia] walks",
        "[Tom] sits",
        "[Mia] eats; fast",
    ]
    story = parse_story("[Mia] a woman; [Tom] a man", "[Mia]\n[Tom]", NONE)
    assert [(found.name, found.description) for found in story.characters] == [("Mia", "a woman"), ("Tom", "a man")]
    assert parse_story("a girl; red coat", "walks", NONE).characters[0].description == "a girl; red coat"


@pytest.mark.parametrize(
    ("line", "text", "caption"),
    [
        ("[Mia] in a #ff0000 dress", "[Mia] in a #ff0000 dress", "Mia in a #ff0000 dress"),
        ("[Mia] in #0af and #00FF00 #Nice", "[Mia] in #0af and #00FF00", "Nice"),
        ("[Mia] paints #Make it #a1b2c3", "[Mia] paints", "Make it #a1b2c3"),
        ("[Mia] is #decade", "[Mia] is", "decade"),
        ("[Mia] is #bad", "[Mia] is", "bad"),
        ("[Mia] in #ffffff #100", "[Mia] in #ffffff", "100"),
        ("[Mia] waves ## Hello", "[Mia] waves", "Hello"),
    ],
)
def test_colours_are_not_captions(line, text, caption):
    assert panels(line, TWO) == [(1, text, caption)]


def test_colours_are_not_comments():
    (character,) = parse_story("a girl in #ff8800 # the lead", "walks", NONE).characters
    assert character.description == "a girl in #ff8800"


@pytest.mark.parametrize(
    ("line", "prompt", "names"),
    [
        ("Mia: reads a map", "a tall woman reads a map", ("Mia",)),
        ("MIA: reads a map", "a tall woman reads a map", ("Mia",)),
        ("[Mia]: reads a map", "a tall woman reads a map", ("Mia",)),
        ("[Mia] - reads a map", "a tall woman reads a map", ("Mia",)),
        ("1. Mia： reads a map", "a tall woman reads a map", ("Mia",)),
        ("Mia reads a map", "a tall woman reads a map", ("Mia",)),
        ("{Mia} reads a map", "a tall woman reads a map", ("Mia",)),
        ("(Mia and Tom) sit", "a tall woman and an old man sit", ("Mia", "Tom")),
        ("（Mia & Tom） sit", "a tall woman & an old man sit", ("Mia", "Tom")),
        ("[Tom, Mia] sit", "an old man, a tall woman sit", ("Mia", "Tom")),
        ("【Tom和Mia】 sit", "an old man 和 a tall woman sit", ("Mia", "Tom")),
        ("Mia and Tom: sit", "a tall woman and an old man sit", ("Mia", "Tom")),
        ("[Mia] gives Tom a key", "a tall woman gives an old man a key", ("Mia", "Tom")),
        ("(Mia:1.2) (sits:0.9)", "(a tall woman:1.2) (sits:0.9)", ("Mia",)),
        ("[Mia] at Mia's house", "a tall woman at Mia's house", ("Mia",)),
        ("Tom's house", "Tom's house", ()),
        ("a Tom-tom", "a Tom-tom", ()),
        ("Close-up: a hand", "Close-up: a hand", ()),
        ("NC: a clock", "a clock", ()),
        ("(NC) a clock", "a clock", ()),
    ],
)
def test_names_without_square_brackets(line, prompt, names):
    assert shown(line) == [(prompt, names)]


def test_names_of_a_script_without_spaces_and_capitals():
    found = shown("小明在跑步\n（小明和小红）跳舞\n小红：唱歌", "小明：男孩\n小红：女孩")
    assert [names for _, names in found] == [("小明",), ("小明", "小红"), ("小红",)]
    assert found[0][0] == "男孩在跑步"


@pytest.mark.parametrize("form", ["{}: {}", "{} - {}", "({}) {}", "[{}]: {}", "1. {}: {}", "- [{}] - {}", '"{}: {}",'])
def test_characters_without_square_brackets(form):
    characters = "\n".join(form.format(*pair) for pair in (("Mia", "a tall woman"), ("Tom", "an old man")))
    story = parse_story(characters, "Mia reads\n[Tom] sits", NONE)
    assert [(found.name, found.description) for found in story.characters] == [
        ("Mia", "a tall woman"),
        ("Tom", "an old man"),
    ]


def test_a_sheet_of_one_character_is_not_a_list_of_names():
    story = parse_story("Hair: red\nEyes: blue", "walks\nsits", NONE)
    assert not story.named and story.panels[0].prompt == "Hair: red Eyes: blue, walks"
    assert parse_story("(blue eyes) girl", "walks", NONE).characters[0].description == "(blue eyes) girl"


@pytest.mark.parametrize(
    ("characters", "text", "message"),
    [
        ("Mia: a woman\nwith red hair\nTom: a man", "Mia: a\nTom: b", "Characters, line 2: 'with red hair' does not"),
        ("[cat] a cat", "[cat] runs\nthe cat sleeps", r"Panels, line 2: 'the cat sleeps' .*Write \[cat\] .* or \[NC\]"),
        (TWO, "Mai: reads", r"Panels, line 1: 'Mai: reads' seems to mean the character Mia.*Write \[Mia\]"),
        (TWO, "[Mia and Bob] sit", r"unknown character \[Mia and Bob\]"),
    ],
)
def test_what_may_be_meant_otherwise_names_line_and_form(characters, text, message):
    with pytest.raises(ValueError, match=message):
        parse_story(characters, text, NONE)


def test_the_node_shows_what_it_understood():
    output = StoryScript.execute(TWO, "1. Mia: reads #Hm\n(Mia and Tom) sit\n[NC] rain", NONE, "")
    expected = (
        "3 panels, style (No style)\n"
        "[Mia] a tall woman: in panels 1, 2\n"
        "[Tom] an old man: in panel 2\n"
        "Panel 1 (line 1): [Mia]\n    prompt: a tall woman reads\n    caption: Hm\n"
        "Panel 2 (line 2): [Mia] and [Tom]\n    prompt: a tall woman and an old man sit\n    caption: Mia and Tom sit\n"
        "Panel 3 (line 3): no character\n    prompt: rain\n    caption: rain\n"
        "Negative prompt: none"
    )
    assert output.ui.as_dict()["text"] == (expected,) and outline(output.result[0]) == expected
