"""Node ids, inputs, limits and outputs: what saved workflows and API clients depend on.

A change made on purpose: `python3 scripts/update_schemas.py` writes the snapshot again.
"""

import inspect
import json

import node_schemas
import pytest

from consistent_video.nodes.extension import REPLACEMENTS

NODES = {node.GET_SCHEMA().node_id: node for node in node_schemas.nodes()}
SCHEMAS = {node_id: node.GET_SCHEMA() for node_id, node in NODES.items()}
each_node = pytest.mark.parametrize("node_id", NODES)


def test_schemas_equal_the_snapshot():
    stored = json.loads(node_schemas.SNAPSHOT.read_text(encoding="utf-8"))
    assert node_schemas.snapshot() == stored, "Changed on purpose? Run python3 scripts/update_schemas.py."


def test_ids_have_the_prefix_and_are_unique():
    assert len(NODES) == len(node_schemas.nodes())
    assert all(node_id.startswith("ConsistentVideo") for node_id in NODES)


@each_node
def test_limits_hold_the_default(node_id):
    for entry in node_schemas.snapshot()[node_id]["inputs"]:
        if entry["type"] in ("INT", "FLOAT"):
            assert entry["min"] <= entry["default"] <= entry["max"], entry
            assert entry["type"] != "INT" or (entry["default"] - entry["min"]) % entry.get("step", 1) == 0, entry
        if entry["type"] == "COMBO" and entry["id"] not in node_schemas.FILE_COMBOS:
            assert entry["default"] in entry["options"], entry


@each_node
def test_methods_take_the_inputs(node_id):
    node, ids = NODES[node_id], [entry.id for entry in SCHEMAS[node_id].inputs]
    own = vars(node)
    assert list(inspect.signature(node.execute).parameters) == ids
    if "fingerprint_inputs" in own:
        assert list(inspect.signature(node.fingerprint_inputs).parameters) == ids
    if "validate_inputs" in own:
        assert set(inspect.signature(node.validate_inputs).parameters) <= set(ids)


@pytest.mark.parametrize("replacement", REPLACEMENTS, ids=lambda replacement: replacement.old_node_id)
def test_replacements_fill_every_input_of_their_node(replacement):
    schema = SCHEMAS[replacement.new_node_id]
    filled = [mapping["new_id"] for mapping in replacement.input_mapping]
    assert sorted(filled) == sorted(entry.id for entry in schema.inputs)
    assert all(m["old_id"] in replacement.old_widget_ids for m in replacement.input_mapping if "old_id" in m)
    options = {entry.id: getattr(entry, "options", None) for entry in schema.inputs}
    assert all(m["set_value"] in options[m["new_id"]] for m in replacement.input_mapping if "set_value" in m)
    assert all(mapping["new_idx"] < len(schema.outputs) for mapping in replacement.output_mapping)
    assert replacement.old_node_id not in NODES
