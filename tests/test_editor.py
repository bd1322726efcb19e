"""The pack in the graph editor: workflows from the template browser, runs, help pages, translations."""

import json
import time
from pathlib import Path

import example_inputs
import pytest
from editor_driver import CHROMIUM, SMALL, Editor
from workflow_to_prompt import to_prompt

from comfy_process import REPOSITORY

pytestmark = [
    pytest.mark.server,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]

WORKFLOWS = sorted((REPOSITORY / "example_workflows").glob("*.json"))
BANK_WORKFLOW = "Story to comic"
NODES = sorted(json.loads((Path(__file__).parent / "data" / "schema.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def editor(server):
    example_inputs.write_inputs(server.folder / "input")
    with Editor(server.url) as editor:
        yield editor


@pytest.fixture(autouse=True)
def inference():
    """The browser's event loop does not mix with torch's inference mode; nothing here computes."""


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_template_browser_opens_the_workflow_and_the_editor_queues_what_the_api_would(editor, server, path):
    editor.open_template(path.stem)
    assert editor.unknown_types() == []
    expected = to_prompt(json.loads(path.read_text(encoding="utf-8")), server.object_info())
    assert inputs_of(editor.prompt()) == inputs_of(expected)


def inputs_of(prompt):
    """Node id -> type and inputs, without the player that the editor adds to a node that loads a video."""
    return {
        key: (node["class_type"], {name: value for name, value in node["inputs"].items() if name != "video-preview"})
        for key, node in prompt.items()
    }


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_run_button_brings_the_clip_into_the_editor(editor, server, path):
    draw_bank(editor, server, path)
    editor.open_template(path.stem)
    editor.make_small(small_values(path))
    before = set(server.history_ids())
    editor.run()
    deadline = time.monotonic() + 180
    while not (new := set(server.history_ids()) - before):
        assert time.monotonic() < deadline, server.log_tail()
        editor.page.wait_for_timeout(500)
    saver = next(node["class_type"] for node in editor.prompt().values() if node["class_type"].startswith("Save"))
    editor.wait_for_result(saver)
    entry = server.history(new.pop())
    assert entry["status"]["status_str"] == "success"
    files = [file for output in entry["outputs"].values() for file in output.get("images", [])]
    assert len(files) >= 1, entry["outputs"]
    assert all((server.folder / file["type"] / file["subfolder"] / file["filename"]).is_file() for file in files)


def draw_bank(editor, server, path):
    """Queue the workflow that saves the character bank which another one loads, unless it is there."""
    banks = server.folder / "output" / "character_banks"
    if "ConsistentVideoLoadCharacterBank" in path.read_text(encoding="utf-8") and not any(banks.glob("*")):
        editor.open_template(BANK_WORKFLOW)
        editor.make_small(small_values(path))
        server.run(editor.prompt())


def small_values(path):
    """Values for a quick run; captions need panels that are not too small."""
    return SMALL | {"width": 128, "height": 128} if path.stem.startswith("Story") else SMALL


@pytest.mark.parametrize("node", NODES)
def test_help_pages_are_served_where_the_editor_looks(server, node):
    for name in (f"{node}.md", f"{node}/zh.md"):
        page = REPOSITORY / "web" / "docs" / name
        assert server.page(f"/extensions/ComfyUI-ConsistentVideo/docs/{name}") == page.read_text(encoding="utf-8")


def test_chinese_users_see_chinese_names(editor):
    expected = json.loads((REPOSITORY / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    editor.set_locale("zh")
    titles = editor.page.evaluate("ids => ids.map(id => window.LiteGraph.registered_node_types[id].title)", NODES)
    assert titles == [expected[node]["display_name"] for node in NODES]
