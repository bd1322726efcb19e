"""Turn a workflow as the graph editor saves it into the prompt that the API queue takes.

    python3 scripts/workflow_to_prompt.py workflow.json object_info.json > prompt.json

The editor saves widget values without names; /object_info has the names, in the order of the widgets.
"""

import json
import sys
from pathlib import Path

MUTED, BYPASSED = 2, 4
NOTES = ("Note", "MarkdownNote")
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")
SEED_NAMES = ("seed", "noise_seed")
# what the editor's own widget after a seed holds; it is no input of the node
AFTER_GENERATE = ("fixed", "increment", "decrement", "randomize", "increment-wrap")
EMPTY_VALUES = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False, "IMAGECOMPARE": ["", ""]}


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """API prompt, {node id: {"class_type": ..., "inputs": {...}}}, of an editor workflow (format 0.4 or 1).

    Muted nodes and notes are left out; bypassed nodes and reroutes become the link behind them, primitives their value.
    A widget that the workflow has no value for gets the node's default, as in the editor. Raises ValueError naming
    the node: unknown node type, subgraph, broken link, loop of reroutes, surplus widget values.
    """
    if not isinstance(workflow.get("nodes"), list):
        raise ValueError("Not a workflow of the graph editor: it has no list of nodes (is it an API prompt already?).")
    subgraphs = {subgraph["id"] for subgraph in ((workflow.get("definitions") or {}).get("subgraphs") or [])}
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
    reader = _WidgetReader(node)
    reader.read(info["input"], info.get("input_order") or {})
    reader.check_all_used()
    return {name: _literal(value) for name, value in reader.values.items()}


class _WidgetReader:
    """Gives the saved values of one node their names, in the editor's order of widgets."""

    def __init__(self, node: dict) -> None:
        saved = node.get("widgets_values") or []
        self.node = node
        self.by_name: dict | None = saved if isinstance(saved, dict) else None
        self.rest: list = [] if isinstance(saved, dict) else list(saved)
        # inputs that the workflow itself says have a widget: types that only the editor knows
        self.with_widget = {entry["widget"]["name"] for entry in node.get("inputs") or [] if entry.get("widget")}
        self.values: dict = {}

    def read(self, sections: dict, order: dict, prefix: str = "") -> None:
        """Read the widgets of an input description, {"required": {name: [type, options]}, "optional": ...}."""
        for section in ("required", "optional"):
            specs = sections.get(section) or {}
            buttons = 0
            for name in order.get(section) or specs:
                kind, options = specs[name][0], (specs[name][1:] or [{}])[0] or {}
                if isinstance(kind, list):
                    kind, options = "COMBO", {"options": kind, **options}
                buttons = buttons or _upload_buttons(options)
                if self._is_widget(prefix + name, kind, options):
                    self._read_one(prefix + name, kind, options)
            if section == "required":  # the editor adds its buttons here, and saves a value for them
                del self.rest[:buttons]

    def _is_widget(self, name: str, kind: str, options: dict) -> bool:
        known = kind in WIDGET_TYPES and not options.get("forceInput")
        return known or name in self.with_widget or bool(options.get("socketless"))

    def _read_one(self, name: str, kind: str, options: dict) -> None:
        if self.by_name is not None:
            value = self.by_name.get(name)
        else:
            value = self.rest.pop(0) if self.rest else None
        if value is None:
            value = _default(self.node, name, kind, options)
        self.values[name] = value
        if kind == "COMFY_DYNAMICCOMBO_V3":  # each choice brings widgets of its own
            chosen = next((option["inputs"] for option in options["options"] if option["key"] == value), {})
            self.read(chosen, {}, f"{name}.")
        elif options.get("control_after_generate", kind == "INT" and name in SEED_NAMES):
            self._skip_editor_widgets(kind)

    def _skip_editor_widgets(self, kind: str) -> None:
        if self.rest and self.rest[0] in AFTER_GENERATE:
            del self.rest[: 2 if kind == "COMBO" else 1]  # a combo has a filter, too

    def check_all_used(self) -> None:
        # the editor's previews (of text, of files) save a value although they are no input
        if self.values and any(value not in (None, "") for value in self.rest):
            raise ValueError(f"{_name(self.node)}: {len(self.rest)} more widget values than widgets: {self.rest!r}.")


def _upload_buttons(options: dict) -> int:
    """How many widgets the editor adds to a node with this input: a button, for audio also a player."""
    if options.get("audio_upload"):
        return 2
    return int(any(key.endswith("_upload") and on is True for key, on in options.items()))


def _default(node: dict, name: str, kind: str, options: dict) -> object:
    if options.get("default") is not None:
        return options["default"]
    if kind in EMPTY_VALUES:
        return EMPTY_VALUES[kind]
    if options.get("options"):
        first = options["options"][0]
        return first["key"] if isinstance(first, dict) else first
    raise ValueError(f"{_name(node)}: the workflow has no value for {name!r}, and the node no default.")


if __name__ == "__main__":
    documents = [json.loads(Path(argument).read_text(encoding="utf-8")) for argument in sys.argv[1:3]]
    json.dump(to_prompt(*documents), sys.stdout, indent=2)
