"""What a training run is told: files and overrides, errors that name the fault, and documentation of every field."""

import re
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from comfy_process import REPOSITORY
from consistent_video.training.settings import (
    ConsistI2VSettings,
    MotionPredictorSettings,
    describe,
    read_settings,
)

CONFIGS = REPOSITORY / "training" / "configs"
EXAMPLES = {"consisti2v.yaml": ConsistI2VSettings, "motion_predictor.yaml": MotionPredictorSettings}
KINDS = tuple(EXAMPLES.values())
PAGES = {"en": REPOSITORY / "web" / "docs" / "Training.md", "zh": REPOSITORY / "web" / "docs" / "Training" / "zh.md"}
FIELDS_HEADING = {"en": "## Fields", "zh": "## 字段"}
REQUIRED = {"en": "required", "zh": "必填"}
CHINESE = re.compile("[\u4e00-\u9fff]")
MINIMAL = """
output: run
pretrained: base
data:
  sources: [{annotations: a.jsonl, folder: videos}]
"""

each_example = pytest.mark.parametrize(("name", "kind"), EXAMPLES.items())
each_language = pytest.mark.parametrize("language", PAGES)


@pytest.fixture
def file(tmp_path):
    """A file that is enough for a ConsistI2V run."""
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8")
    return path


def read(path: Path, *overrides: str) -> ConsistI2VSettings:
    return read_settings(ConsistI2VSettings, path, overrides)


def faults(path: Path, *overrides: str) -> list[str]:
    """What `read_settings` finds wrong with fields; the message begins with the file."""
    with pytest.raises(ValueError) as caught:
        read(path, *overrides)
    first, *rest = str(caught.value).splitlines()
    source = f"{path} with {' '.join(overrides)}" if overrides else path
    assert first == f"{source} does not describe a run:"
    return rest


def test_warmup_needs_a_schedule(file):
    assert faults(file, "warmup_steps=5") == [
        "  settings: Value error, warmup_steps do nothing with the schedule constant: choose constant_with_warmup"
    ]
    assert read(file, "warmup_steps=5", "schedule=cosine").warmup_steps == 5


def fields(annotation) -> set[str]:
    """Every key that a file may hold, sections and their lists included."""
    found = set()
    for name, field in annotation.model_fields.items():
        found.add(name)
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= {f"{name}.{inner}" for inner in fields(part)}
    return found


def keys(values: dict) -> set[str]:
    """The same of what a file holds."""
    found = set()
    for name, value in values.items():
        found.add(name)
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, dict):
                found |= {f"{name}.{inner}" for inner in keys(part)}
    return found


def choices(kind: type[BaseModel]) -> set[str]:
    """The words that fields with fixed values may have."""
    found = set()
    for field in kind.model_fields.values():
        parts = (field.annotation, *get_args(field.annotation))
        found |= {word for part in parts if get_origin(part) is Literal for word in get_args(part)}
        for part in parts:
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= choices(part)
    return found


def test_a_file_is_read(file):
    settings = read(file)
    assert (settings.output, settings.pretrained) == (Path("run"), Path("base"))
    [source] = settings.data.sources
    assert (source.annotations, source.folder, source.captions) == (Path("a.jsonl"), Path("videos"), None)
    assert (settings.data.frames, settings.steps, settings.learning_rate) == (16, 200_000, 5e-5)


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("steps=12", "", "steps", 12),
        ("output=~/elsewhere", "", "output", Path.home() / "elsewhere"),
        ("learning_rate=1e-4", "", "learning_rate", 1e-4),
        ("epsilon=1E-6", "", "epsilon", 1e-6),
        ("mixed_precision=fp32", "", "mixed_precision", "fp32"),
        ("tracker=none", "", "tracker", "none"),
        ("ema=true", "", "ema", True),
        ("betas=[0.8, 0.99]", "", "betas", (0.8, 0.99)),
        ("trainable_modules=[conv3ds., tempo_attns.]", "", "trainable_modules", ["conv3ds.", "tempo_attns."]),
        ("data.frames=8", "data", "frames", 8),
        ("data.strides=[2, 2]", "data", "strides", (2, 2)),
        ("data.crop=random", "data", "crop", "random"),
        ("noise.mode=progressive", "noise", "mode", "progressive"),
        ("validation.frame_init=null", "validation", "frame_init", None),
        ("validation.negative=a=b", "validation", "negative", "a=b"),
    ],
)
def test_an_override_replaces_one_field(file, override, section, field, value):
    settings, plain = read(file, override), read(file)
    changed, before = (getattr(whole, section) if section else whole for whole in (settings, plain))
    found = getattr(changed, field)
    assert found == value and type(found) is type(value)
    expected = before.model_copy(update={field: value})
    assert settings == (plain.model_copy(update={section: expected}) if section else expected)


def test_overrides_follow_each_other_and_replace_lists_as_a_whole(file):
    settings = read(file, "steps=1", "steps=2", "data.sources=[{annotations: b.jsonl, folder: b, captions: c.jsonl}]")
    assert settings.steps == 2
    assert settings.data.sources[0].model_dump(mode="json") == {
        "annotations": "b.jsonl",
        "folder": "b",
        "captions": "c.jsonl",
    }


def test_overrides_may_be_all_there_is(tmp_path):
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing\n", encoding="utf-8")
    given = ("output=run", "pretrained=base", "data.sources=[{annotations: a.jsonl, folder: videos}]")
    settings = read(empty, *given, "validation.clips=[{prompt: rain, first_frame: rain.png}]")
    assert settings.validation.clips[0].prompt == "rain"


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("colour=red", "  colour: there is no such field; --help lists them"),
        ("data.colour=red", "  data.colour: there is no such field; --help lists them"),
        ("noise.colour=red", "  noise.colour: there is no such field; --help lists them"),
        ("data.sources=[{annotations: a.jsonl}]", "  data.sources.0.folder: Field required"),
        ("data.sources=[]", "  data.sources: List should have at least 1 item"),
        ("data.frames=1", "  data.frames: Input should be greater than or equal to 2"),
        ("data.width=100", "  data.width: Input should be a multiple of 8"),
        ("data.flip=1.5", "  data.flip: Input should be less than or equal to 1"),
        ("data.strides=[5, 1]", "  data: Value error, strides [5, 1]: expected two numbers from 1 up"),
        ("data.strides=[0, 1]", "  data: Value error, strides [0, 1]: expected two numbers from 1 up"),
        ("data.strides=3", "  data.strides: Input should be a valid tuple"),
        ("steps=many", "  steps: Input should be a valid integer"),
        ("steps=0", "  steps: Input should be greater than or equal to 1"),
        ("learning_rate=0", "  learning_rate: Input should be greater than 0"),
        ("learning_rate=fast", "  learning_rate: Input should be a valid number"),
        ("mixed_precision=fp8", "  mixed_precision: Input should be 'fp32', 'fp16' or 'bf16'"),
        ("ema_decay=1", "  ema_decay: Input should be less than 1"),
        ("validation.frame_init=1000", "  validation.frame_init: Input should be less than or equal to 999"),
        ("validation.clips=[{prompt: rain}]", "  validation.clips.0.first_frame: Field required"),
        ("trainable_modules=all", "  trainable_modules: Input should be a valid list"),
    ],
)
def test_a_wrong_value_names_the_file_and_the_field(file, override, fault):
    [found] = faults(file, override)
    assert found.startswith(fault)


def test_missing_fields_are_named_all_at_once(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {frames: 8}\n", encoding="utf-8")
    assert faults(path) == [f"  {name}: Field required" for name in ("output", "data.sources", "pretrained")]


def test_some_loss_is_needed(file):
    text = file.read_text(encoding="utf-8").replace("pretrained", "i2vgenxl")
    file.write_text(f"{text}embedding_loss: 0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="embedding_loss and video_loss are both 0: there is nothing to learn from"):
        read_settings(MotionPredictorSettings, file)
    assert read_settings(MotionPredictorSettings, file, ["video_loss=0.5"]).video_loss == 0.5


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read(tmp_path / "none.yaml")
    assert str(caught.value) == f"{tmp_path / 'none.yaml'} was not found. Give the YAML file of the run."


@pytest.mark.parametrize("text", ["data: [1,", "a: b: c", "steps: 1\n\tdata: 2"])
def test_a_file_that_is_no_yaml_is_named_with_the_place(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path} is not valid YAML: ") and "line " in str(caught.value)


@pytest.mark.parametrize(("text", "found"), [("- a\n- b\n", "list"), ("steps\n", "str"), ("12\n", "int")])
def test_a_file_without_fields_is_named_with_what_it_holds(tmp_path, text, found):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value) == f"{path} holds a YAML {found}, expected fields with values."


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "'steps' is no override. Write key=value, for example steps=1000."),
        ("data.sources.folder=b", "'data.sources.folder=b': sources is not a section. Lists are changed as a whole"),
        ("data.sources.0.folder=b", "'data.sources.0.folder=b': sources is not a section."),
        ("output.name=b", "'output.name=b': output is not a section."),
        ("betas=[0.9", "betas=[0.9 is not valid YAML: "),
    ],
)
def test_a_malformed_override_is_named(file, override, message):
    with pytest.raises(ValueError) as caught:
        read(file, override)
    assert str(caught.value).startswith(message)


@each_example
def test_the_examples_are_complete_and_hold_fields_only(name, kind):
    path = CONFIGS / name
    settings = read_settings(kind, path)
    assert isinstance(settings, kind)
    assert keys(yaml.safe_load(path.read_text(encoding="utf-8"))) <= fields(kind)
    assert sorted(entry.name for entry in CONFIGS.iterdir()) == sorted(EXAMPLES)


def test_the_published_settings_are_the_defaults():
    path = CONFIGS / "consisti2v.yaml"
    assert "published settings" in path.read_text(encoding="utf-8").splitlines()[0]
    settings = read_settings(ConsistI2VSettings, path)
    own = {"output": settings.output, "pretrained": settings.pretrained}
    data = {"sources": settings.data.sources, "workers": settings.data.workers}
    assert settings == ConsistI2VSettings(**own, data=data)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_is_described_once(kind):
    rows = describe(kind)
    listed = [key.replace("[]", "") for key, _, _ in rows]
    assert len(set(listed)) == len(listed)
    # Sections are no rows of their own: their fields are.
    sections = {key.rpartition(".")[0] for key in listed} - {""}
    lists = {key.partition("[]")[0] for key, _, _ in rows if "[]" in key}
    assert set(listed) == fields(kind) - (sections - lists)
    assert all(meaning and meaning == meaning.strip() for _, _, meaning in rows)
    assert all("|" not in part for row in rows for part in row)


@pytest.mark.parametrize("kind", KINDS)
def test_every_section_and_field_has_a_description(kind):
    unexplored = [kind]
    while unexplored:
        section = unexplored.pop()
        assert section.__doc__, section
        for name, field in section.model_fields.items():
            assert field.description, (section, name)
            parts = (field.annotation, *get_args(field.annotation))
            unexplored += [part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)]


@pytest.mark.parametrize("kind", KINDS)
def test_described_defaults_are_the_values(kind):
    settings = read_settings(kind, CONFIGS / next(name for name, other in EXAMPLES.items() if other is kind))
    for key, default, _ in describe(kind):
        if "[]" in key or default == "required":
            continue
        *path, name = key.split(".")
        section = settings
        for part in path:
            section = getattr(section, part)
        expected = type(section).model_fields[name].get_default(call_default_factory=True)
        found = yaml.safe_load(default)
        assert found == (list(expected) if isinstance(expected, tuple) else expected), key


def documented(rows: list[tuple[str, ...]], language: str) -> list[tuple[str, ...]]:
    """Rows of `describe` as the page writes them."""
    words = {"required": REQUIRED[language]}
    return [
        (f"`{key}`", *(words.get(default, f"`{default}`") for default in defaults), meaning)
        for key, *defaults, meaning in rows
    ]


def expected_rows(language: str) -> list[tuple[str, ...]]:
    """The page's rows: fields that both trainers have with both defaults, then those of each one."""
    consisti2v, motion_predictor = (describe(kind) for kind in KINDS)
    other = {(key, meaning): default for key, default, meaning in motion_predictor}
    both = [
        (key, default, other[key, meaning], meaning) for key, default, meaning in consisti2v if (key, meaning) in other
    ]
    shared = {(key, meaning) for key, *_, meaning in both}
    rest = [[row for row in rows if (row[0], row[2]) not in shared] for rows in (consisti2v, motion_predictor)]
    return [row for rows in (both, *rest) for row in documented(rows, language)]


def rows_of_page(language: str) -> list[tuple[str, ...]]:
    text = PAGES[language].read_text(encoding="utf-8").partition(f"\n{FIELDS_HEADING[language]}\n")[2]
    lines = text.partition("\n## ")[0].splitlines()
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines if line.startswith("| `")]


@each_language
def test_the_page_lists_every_field_with_its_default(language):
    found, expected = rows_of_page(language), expected_rows(language)
    assert [row[:-1] for row in found] == [row[:-1] for row in expected]
    if language == "en":
        assert found == expected
    else:
        assert [row for row in found if not CHINESE.search(row[-1])] == []


@each_language
def test_the_page_names_every_choice(language):
    page = PAGES[language].read_text(encoding="utf-8")
    words = {word for kind in KINDS for word in choices(kind)}
    assert words >= {"cosine_with_restarts", "random", "wandb", "progressive"}
    assert [word for word in sorted(words) if f"`{word}`" not in page] == []
