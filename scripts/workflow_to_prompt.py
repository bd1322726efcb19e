"""Turn a workflow as the graph editor saves it into the prompt that the API queue takes.

    python3 scripts/workflow_to_prompt.py workflow.json object_info.json > prompt.json

The editor saves widget values without names; /object_info has the names, in the order of the widgets.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

MUTED, BYPASSED = 2, 4
NOTES = ("Note", "MarkdownNote")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEED_NAMES = ("seed", "noise_seed")
# what the editor's own widget after a seed holds; it is no input of the node
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
EMPTY_VALUES = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """API prompt, {node id: {"class_type": ..., "inputs": {...}}}, of an editor workflow (format 0.4 or 1).

    Muted nodes and notes are left out; bypassed nodes and reroutes become the link behind them, primitives their value.
    A widget that the workflow has no value for gets the node's default, as in the editor. Raises ValueError naming
    the node: unknown node type, subgraph, broken link, loop of reroutes, surplus widget values.
    """
    if not isinstance(workflow.get("nodes"), list):
        raise ValueError("Not a workflow of the graph editor: it has no list of nodes (is it an API prompt already?).")
    subgraphs = {subgraph["id"] for subgraph in workflow.get("definitions", {}).get("subgraphs", [])}
    graph = _Graph(workflow)
    prompt = {}
    for node in graph.nodes.values():
        kind = node["type"]
        if node.get("mode") in (MUTED, BYPASSED) or kind in (*NOTES, "Reroute", "PrimitiveNode"):
            continue
        if kind in subgraphs:
            raise ValueError(f"{_name(node)} is a subgraph: unpack it in the editor and save the workflow again.")
        if kind not in object_info:
            raise ValueError(f"{_name(node)}: this ComfyUI has no such node.")
        inputs = _widget_values(node, object_info[kind])
        inputs.update(graph.linked_values(node))
        prompt[str(node["id"])] = {"class_type": kind, "inputs": inputs}
    return prompt


def _name(node: dict) -> str:
    return f"node {node['id']} ({node['type']})"


class _Graph:
    """The workflow's nodes by id and its links by id, as (origin node id, origin slot)."""

    def __init__(self, workflow: dict) -> None:
        self.nodes = {node["id"]: node for node in workflow["nodes"]}
        self.links = {}
        for link in workflow.get("links") or []:
            if isinstance(link, dict):  # format 1
                self.links[link["id"]] = (link["origin_id"], link["origin_slot"])
            else:
                self.links[link[0]] = (link[1], link[2])

    def linked_values(self, node: dict) -> dict:
        """What the node's linked inputs get: [node id, slot], or the value of a primitive."""
        values = {}
        for entry in node.get("inputs") or []:
            if entry.get("link") is None:
                continue
            source = self._source(entry["link"], node)
            if source is not None:
                values[entry["name"]] = source
        return values

    def _source(self, link: int | None, target: dict) -> object:
        """Follow a link over reroutes and bypassed nodes; None when nothing is behind it."""
        passed = set()
        while link is not None:
            if link in passed:
                raise ValueError(f"{_name(target)}: a link leads round in a circle.")
            passed.add(link)
            if link not in self.links or self.links[link][0] not in self.nodes:
                raise ValueError(f"{_name(target)}: link {link} has no node behind it.")
            origin_id, slot = self.links[link]
            origin = self.nodes[origin_id]
            if origin.get("mode") == MUTED:
                return None
            if origin["type"] == "Reroute":
                link = origin["inputs"][0].get("link")
            elif origin.get("mode") == BYPASSED:
                link = _bypass(origin, slot)
            elif origin["type"] == "PrimitiveNode":
                return _primitive_value(origin)
            else:
                return [str(origin_id), slot]
        return None


def _primitive_value(node: dict) -> object:
    values = node.get("widgets_values")
    if not values:
        raise ValueError(f"{_name(node)} is linked but has no value.")
    return _literal(values[0])


def _bypass(node: dict, slot: int) -> int | None:
    """The link that a bypassed node passes on: of the input in the same place, else of the first of the same type."""
    inputs = node.get("inputs") or []
    kind = node["outputs"][slot]["type"]
    for entry in [*inputs[slot : slot + 1], *inputs]:
        if entry["type"] == kind:
            return entry.get("link")
    return None


def _literal(value: object) -> object:
    """Lists are wrapped, or the server would read them as links."""
    return {"__value__": value} if isinstance(value, list) else value


def _widget_values(node: dict, info: dict) -> dict:
    """Name -> value of the node's widgets."""
    saved = node.get("widgets_values") or []
    with_widget = {entry["widget"]["name"] for entry in node.get("inputs") or [] if entry.get("widget")}
    widgets = list(_widgets(info, with_widget))
    if isinstance(saved, dict):
        chosen = {name: saved.get(name) for name, _, _ in widgets}
    else:
        chosen = _named(node, saved, widgets)
    values = {}
    for name, kind, options in widgets:
        if kind is None:  # a button
            continue
        value = chosen[name] if chosen.get(name) is not None else _default(node, name, kind, options)
        values[name] = _literal(value)
    return values


def _named(node: dict, saved: list, widgets: list[tuple]) -> dict:
    """Give the saved values their names; what follows a seed and belongs to the editor is passed over."""
    chosen = {}
    rest = list(saved)
    for name, kind, options in widgets:
        if not rest:
            break
        chosen[name] = rest.pop(0)
        if _is_seed(name, kind, options) and rest and rest[0] in AFTER_GENERATE:
            rest.pop(0)
            if kind == "COMBO" and rest:
                rest.pop(0)  # the filter of the combo
    # trailing None: widgets that the editor shows but does not save, such as previews
    if any(value is not None and value != "" for value in rest):
        raise ValueError(f"{_name(node)}: {len(rest)} more widget values than widgets: {rest!r}.")
    return chosen


def _is_seed(name: str, kind: str | None, options: dict) -> bool:
    return bool(options.get("control_after_generate", kind == "INT" and name in SEED_NAMES))


def _widgets(info: dict, with_widget: set[str]) -> Iterator[tuple[str, str | None, dict]]:
    """(name, type, options) of the node's widgets in the editor's order; type None is an upload button.

    `with_widget`: inputs that the workflow itself says have a widget (types that only the editor knows).
    """
    for section in ("required", "optional"):
        specs = info["input"].get(section) or {}
        buttons = []
        for name in (info.get("input_order") or {}).get(section) or specs:
            kind, options = specs[name][0], (specs[name][1:] or [{}])[0] or {}
            if isinstance(kind, list):
                kind, options = "COMBO", {"options": kind, **options}
            if (
                (kind in WIDGET_TYPES and not options.get("forceInput"))
                or name in with_widget
                or "socketless" in options
            ):
                yield name, kind, options
            if any(key.endswith("_upload") and on is True for key, on in options.items()):
                buttons = [("upload", None, {})]
                if options.get("audio_upload"):
                    buttons.insert(0, ("audioUI", None, {}))
        if section == "required":
            yield from buttons


def _default(node: dict, name: str, kind: str, options: dict) -> object:
    if options.get("default") is not None:
        return options["default"]
    if kind in EMPTY_VALUES:
        return EMPTY_VALUES[kind]
    if options.get("options"):
        return options["options"][0]
    raise ValueError(f"{_name(node)}: the workflow has no value for {name!r}, and the node no default.")


if __name__ == "__main__":
    documents = [json.loads(Path(argument).read_text(encoding="utf-8")) for argument in sys.argv[1:3]]
    json.dump(to_prompt(*documents), sys.stdout, indent=2)
