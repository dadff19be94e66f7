"""Workflows made from definitions of nodes: what cannot be right is refused while they are made."""

from __future__ import annotations

import pytest

from bench.pack import api
from bench.pack.definitions import Definition, definitions
from bench.pack.graph import Graph


def node(inputs: dict, outputs: tuple = (), **more: object) -> dict:
    return {"input": inputs, "output": outputs, "output_name": outputs, "python_module": "nodes", **more}


OBJECT_INFO = {
    "Load": node({
        "required": {"file": (["a.safetensors"],), "mode": (["auto", "off"], {"default": "auto"})},
    }, ("MODEL",)),
    "Sample": node({
        "required": {"model": ("MODEL", {}), "seed": ("INT", {"default": 0, "control_after_generate": True}),
                     "text": ("STRING", {"multiline": True})},
        "optional": {"stack": ("STACK", {}), "how": ("COMBO", {"options": ["x", "y"], "default": "y"})},
    }, ("LATENT", "STRING")),
    "Show": node({"required": {"text": ("STRING", {})}}),
}  # fmt: skip


@pytest.fixture
def known() -> dict[str, Definition]:
    return definitions(OBJECT_INFO)


@pytest.fixture
def graph(known: dict[str, Definition]) -> Graph:
    return Graph("test", known)


def test_what_was_put_in_is_what_a_server_gets(graph: Graph, known: dict[str, Definition]) -> None:
    load = graph.node("Load", (0, 0), file="mine.safetensors", mode="off")
    sample = graph.node("Sample", (1, 0), model=load["model"], seed=7, text="hello", control_after_generate="increment")
    graph.node("Show", (2, 0), text=sample["string"])
    graph.note((0, 0), "a note")
    saved = graph.saved()
    assert [each["widgets_values"] for each in saved["nodes"]] == [
        ["mine.safetensors", "off"], [7, "increment", "hello", "y"], [""], ["a note"],
    ]  # fmt: skip
    assert api.prompt(saved, known) == {
        "1": {"class_type": "Load", "inputs": {"file": "mine.safetensors", "mode": "off"}},
        "2": {"class_type": "Sample", "inputs": {"model": ["1", 0], "seed": 7, "text": "hello", "how": "y"}},
        "3": {"class_type": "Show", "inputs": {"text": ["2", 1]}},
    }
    assert graph.saved() == saved


@pytest.mark.parametrize(
    ("kind", "inputs", "message"),
    [
        ("Load", {"file": "a.safetensors", "nothing": 1}, "Load has no input nothing: file, mode"),
        ("Load", {}, "Load: file needs a value"),
        ("Load", {"file": "a.safetensors", "mode": "on"}, "Load: mode is 'on', but can be auto, off"),
        ("Sample", {"text": "hello"}, "Sample: model has to be linked"),
    ],
)
def test_what_the_node_does_not_have_is_refused(graph: Graph, kind: str, inputs: dict, message: str) -> None:
    with pytest.raises((KeyError, ValueError), match=message):
        graph.node(kind, (0, 0), **inputs)


def test_output_that_is_not_there_is_refused(graph: Graph) -> None:
    load = graph.node("Load", (0, 0), file="a.safetensors")
    with pytest.raises(KeyError, match="Load has no output clip: model"):
        load["clip"]


def test_widgets_of_another_version_of_the_node_are_noticed(graph: Graph, known: dict[str, Definition]) -> None:
    graph.node("Load", (0, 0), file="a.safetensors")
    saved = graph.saved()
    saved["nodes"][0]["widgets_values"] = ["a.safetensors"]
    with pytest.raises(ValueError, match="no value for mode"):
        api.prompt(saved, known)
    saved["nodes"][0]["widgets_values"] = ["a.safetensors", "auto", "more"]
    with pytest.raises(ValueError, match="values of no widget"):
        api.prompt(saved, known)


def test_nodes_of_a_cell_stand_below_each_other_and_cells_beside(graph: Graph) -> None:
    for cell in ((0, 0), (0, 0), (1, 0), (0, 1)):
        graph.note(cell, "x", height=100)
    first, below, beside, row = ((*each["pos"], *each["size"]) for each in graph.saved()["nodes"])
    assert below[1] > first[1] + first[3]
    assert beside[:2] == (first[0] + first[2] + 70, 0)
    assert row[1] > below[1] + below[3]
