"""The example workflows as files: complete, consistent, with the published settings."""

import json

import pytest
from PIL import Image

from comfy_process import REPOSITORY

FOLDER = REPOSITORY / "example_workflows"
WORKFLOWS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}
PUBLISHED = {
    "ModelScope text to video": {"width": 256, "height": 256, "frames": 16, "steps": 50, "cfg": 9, "fps": 8},
    "ModelScope video to video": {"steps": 50, "denoise": 0.6, "cfg": 15, "fps": 8},
    "I2VGen-XL picture to video": {"width": 1280, "height": 704, "frames": 16, "steps": 50, "cfg": 9, "fps": 16},
}


def widgets(workflow):
    """Widget name -> every value it has in a workflow. Named inputs come first, in the order of the values."""
    found = {}
    for node in workflow["nodes"]:
        names = [entry["widget"]["name"] for entry in node.get("inputs", []) if "widget" in entry]
        values = node.get("widgets_values") or []
        values = [value for value in values if value not in ("fixed", "randomize", "increment", "decrement")]
        for name, value in zip(names, values, strict=False):
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_settings_are_the_published_ones(name):
    found = widgets(WORKFLOWS[name])
    assert {key: value for key, value in PUBLISHED[name].items() if value not in found.get(key, [])} == {}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_workflow_has_a_thumbnail_and_says_where_the_weights_go(name):
    with Image.open(FOLDER / f"{name}.jpg") as picture:
        assert picture.width == 1000
    assert (FOLDER / f"{name}.jpg").stat().st_size < 150_000
    notes = [node["widgets_values"][0] for node in WORKFLOWS[name]["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1 and "Where the weights go" in notes[0]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_links_join_nodes_that_know_them(name):
    nodes = {node["id"]: node for node in WORKFLOWS[name]["nodes"]}
    for link, source, output, target, slot, kind in WORKFLOWS[name]["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][slot]["link"] == link
        assert nodes[source]["outputs"][output]["type"] == kind


def test_every_node_of_the_pack_is_in_a_workflow():
    schemas = json.loads((REPOSITORY / "tests" / "data" / "schema.json").read_text(encoding="utf-8"))
    used = {node["type"] for workflow in WORKFLOWS.values() for node in workflow["nodes"]}
    assert set(schemas) - used == set()
