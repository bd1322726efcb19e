"""Editor workflows become the prompts that the API takes."""

import pytest
from workflow_to_prompt import to_prompt

NODES = {
    "Load": {"input": {"required": {"name": [["a", "b"], {}]}}, "output": ["MODEL"]},
    "Text": {"input": {"required": {"text": ["STRING", {"default": ""}], "model": ["MODEL", {}]}}},
    "Sample": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
            },
            "optional": {"eta": ["FLOAT", {"default": 0.5}]},
        }
    },
}


def node(number, kind, values=(), inputs=(), outputs=(), mode=0):
    return {
        "id": number,
        "type": kind,
        "mode": mode,
        "widgets_values": list(values),
        "inputs": [{"name": name, "type": "MODEL", "link": link} for name, link in inputs],
        "outputs": [{"name": "MODEL", "type": "MODEL", "links": list(links)} for links in outputs],
    }


def workflow(*nodes, links=()):
    return {"version": 0.4, "nodes": list(nodes), "links": [list(link) for link in links]}


def test_widgets_get_their_names_and_the_editors_seed_control_is_left_out():
    graph = workflow(
        node(1, "Load", ["b"], outputs=[[1]]),
        node(2, "Sample", [7, "randomize", 4, 0.0], inputs=[("model", 1)]),
        node(3, "MarkdownNote", ["words"]),
        links=[(1, 1, 0, 2, 0, "MODEL")],
    )
    assert to_prompt(graph, NODES) == {
        "1": {"class_type": "Load", "inputs": {"name": "b"}},
        "2": {"class_type": "Sample", "inputs": {"model": ["1", 0], "seed": 7, "steps": 4, "eta": 0.0}},
    }


def test_a_missing_value_is_the_nodes_default():
    graph = workflow(node(2, "Sample", [7, "fixed", 4]))
    assert to_prompt(graph, NODES)["2"]["inputs"]["eta"] == 0.5


@pytest.mark.parametrize("between", [node(9, "Reroute", inputs=[("", 1)], outputs=[[2]])])
def test_reroutes_become_the_link_behind_them(between):
    graph = workflow(
        node(1, "Load", ["a"], outputs=[[1]]),
        between,
        node(2, "Text", ["words"], inputs=[("model", 2)]),
        links=[(1, 1, 0, 9, 0, "MODEL"), (2, 9, 0, 2, 0, "MODEL")],
    )
    assert to_prompt(graph, NODES)["2"]["inputs"] == {"text": "words", "model": ["1", 0]}


def test_bypassed_nodes_pass_their_input_on_and_muted_ones_disappear():
    bypassed = node(9, "Text", ["x"], inputs=[("model", 1)], outputs=[[2]], mode=4)
    graph = workflow(
        node(1, "Load", ["a"], outputs=[[1]]),
        bypassed,
        node(2, "Text", ["words"], inputs=[("model", 2)]),
        node(3, "Load", ["b"], mode=2),
        links=[(1, 1, 0, 9, 0, "MODEL"), (2, 9, 0, 2, 0, "MODEL")],
    )
    prompt = to_prompt(graph, NODES)
    assert set(prompt) == {"1", "2"} and prompt["2"]["inputs"]["model"] == ["1", 0]


@pytest.mark.parametrize(
    ("graph", "words"),
    [
        ({"1": {"class_type": "Load", "inputs": {}}}, "Not a workflow of the graph editor"),
        (workflow(node(5, "Unknown")), "node 5 \\(Unknown\\): this ComfyUI has no such node"),
        (workflow(node(1, "Load", ["a", 3])), "node 1 \\(Load\\): 1 more widget values than widgets: \\[3\\]"),
        (workflow(node(2, "Text", ["x"], inputs=[("model", 4)])), "node 2 \\(Text\\): link 4 has no node behind it"),
    ],
)
def test_broken_workflows_name_the_node(graph, words):
    with pytest.raises(ValueError, match=words):
        to_prompt(graph, NODES)
