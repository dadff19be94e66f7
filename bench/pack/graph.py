"""A workflow as ComfyUI's front end saves it: nodes in a grid that cannot overlap, links, notes. Knows no model.

    graph = Graph("T1", definitions)
    router = graph.node("LunaModelRouter", (0, 0), model_name="sd_xl_base_1.0.safetensors")
    graph.node("VAEDecode", (2, 0), samples=sampler["latent"], vae=router["vae"])
    graph.saved()  # the JSON object

What a node is given is checked against its definition: an input that does not exist, a choice that the class does not
offer and a combo without a value are errors, so a workflow cannot fall behind the nodes unnoticed.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.pack.definitions import Definition, Input

Cell = tuple[int, int]  # column, row

WIDTH = 380
GAP_X, GAP_Y = 70, 70
SLOT, WIDGET, TEXT, PADDING = 22, 32, 130, 40  # height in pixels, roomy enough for both ways to draw nodes
SHOWS = {"SaveImage": 260, "PreviewAny": 120}  # room for what a node shows once it ran
CONTROL = "control_after_generate"
NOTE = "MarkdownNote"
FILE = ".safetensors"
"""What a combo may lack: the file is another for everybody."""


@dataclass(frozen=True)
class Link:
    node: Node
    output: int


@dataclass
class Node:
    """One node of a graph; ``node["model"]`` is a link from its output of that name."""

    id: int
    kind: str
    definition: Definition | None
    cell: Cell
    height: int
    width: int = WIDTH
    title: str = ""
    links: dict[str, Link] = field(default_factory=dict)
    values: list[Any] = field(default_factory=list)

    def __getitem__(self, output: str) -> Link:
        assert self.definition is not None, "a note has no outputs"
        return Link(self, self.definition.output(output))

    def named(self, title: str) -> Node:
        self.title = title
        return self


class Graph:
    """``name`` makes the identity that the front end keeps workflows apart by."""

    def __init__(self, name: str, definitions: Mapping[str, Definition]) -> None:
        self.name = name
        self._definitions = definitions
        self._nodes: list[Node] = []

    def node(self, kind: str, cell: Cell, /, **inputs: object) -> Node:
        """Nodes of one cell stand below each other. ``inputs``: links and widgets' values by name; with those of the
        class ``control_after_generate``, what becomes of the seed: ``fixed``, ``increment``, ``randomize``.
        """
        definition = self._definitions[kind]
        control = str(inputs.pop(CONTROL, "fixed"))
        for name in inputs:
            definition.input(name)
        node = Node(len(self._nodes) + 1, kind, definition, cell, _height(definition))
        for item in definition.inputs:
            given = inputs.get(item.name)
            if isinstance(given, Link):
                node.links[item.name] = given
            elif not item.is_widget and (given is not None or not item.optional):
                raise ValueError(f"{kind}: {item.name} has to be linked")
        for item in definition.widgets:
            node.values += _values(kind, item, inputs.get(item.name), control)
        self._nodes.append(node)
        return node

    def note(self, cell: Cell, text: str, *, width: int = WIDTH, height: int = 200) -> None:
        note = Node(len(self._nodes) + 1, NOTE, None, cell, height, width, "Read me", values=[text])
        self._nodes.append(note)

    def saved(self) -> dict[str, Any]:
        """The workflow as JSON; the same for the same calls."""
        positions = self._positions()
        links: list[list[Any]] = []
        for node in self._nodes:
            for name, link in node.links.items():
                slot = [item.name for item in _slots(node)].index(name)
                type_ = _definition(link.node).outputs[link.output].type
                links.append([len(links) + 1, link.node.id, link.output, node.id, slot, type_])
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"lunashm:{self.name}")),
            "revision": 0,
            "last_node_id": len(self._nodes),
            "last_link_id": len(links),
            "nodes": [_saved(node, positions[node.id], links) for node in self._nodes],
            "links": links,
            "groups": [],
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def _positions(self) -> dict[int, tuple[int, int]]:
        columns, rows = {node.cell[0] for node in self._nodes}, {node.cell[1] for node in self._nodes}
        stacks = {
            (column, row): [node for node in self._nodes if node.cell == (column, row)]
            for column in columns for row in rows
        }  # fmt: skip
        left, lefts = 0, {}
        for column in sorted(columns):
            lefts[column] = left
            left += max(node.width for node in self._nodes if node.cell[0] == column) + GAP_X
        top, tops = 0, {}
        for row in sorted(rows):
            tops[row] = top
            top += max(sum(node.height + GAP_Y for node in stacks[column, row]) for column in columns)
        found = {}
        for (column, row), stack in stacks.items():
            y = tops[row]
            for node in stack:
                found[node.id] = (lefts[column], y)
                y += node.height + GAP_Y
        return found


def _definition(node: Node) -> Definition:
    assert node.definition is not None, "a note has no links"
    return node.definition


def _slots(node: Node) -> list[Input]:
    """In the order of their circles: sockets, then the widgets that a link stands in for."""
    if node.definition is None:
        return []
    return [*node.definition.sockets, *(item for item in node.definition.widgets if item.name in node.links)]


def _height(definition: Definition) -> int:
    texts = sum(item.is_text for item in definition.widgets)
    lines = len(definition.widgets) - texts + sum(item.has_control for item in definition.widgets)
    slots = max(len(definition.sockets), len(definition.outputs))
    return PADDING + slots * SLOT + lines * WIDGET + texts * TEXT + SHOWS.get(definition.kind, 0)


def _values(kind: str, item: Input, given: object, control: str) -> list[Any]:
    """What the front end saves for a widget, a seed's control included."""
    default = item.choices[0] if item.choices and "default" not in item.options else item.options.get("default")
    value = default if given is None or isinstance(given, Link) else given
    if item.type == "COMBO" and given is None and "default" not in item.options:
        raise ValueError(f"{kind}: {item.name} needs a value, or the first file of whoever made this is saved")
    if item.choices and value not in item.choices and not str(value).endswith(FILE):
        raise ValueError(f"{kind}: {item.name} is {value!r}, but can be {', '.join(map(str, item.choices))}")
    if value is None:
        value = "" if item.type == "STRING" else 0
    return [value, control] if item.has_control else [value]


def _saved(node: Node, position: tuple[int, int], links: list[list[Any]]) -> dict[str, Any]:
    slots = _slots(node)
    incoming = {link[4]: link[0] for link in links if link[3] == node.id}
    outputs = node.definition.outputs if node.definition is not None else ()
    if not any(link[1] == node.id for link in links):
        outputs = ()  # newer ComfyUIs have some where older ones have none; the front end adds what the class has
    saved: dict[str, Any] = {
        "id": node.id,
        "type": node.kind,
        "pos": list(position),
        "size": [node.width, node.height],
        "flags": {},
        "order": node.id - 1,
        "mode": 0,
        "inputs": [_saved_input(item, incoming.get(slot)) for slot, item in enumerate(slots)],
        "outputs": [
            {"name": output.name, "type": output.type, "slot_index": slot, "links": _outgoing(links, node.id, slot)}
            for slot, output in enumerate(outputs)
        ],
        "properties": {"Node name for S&R": node.kind, "cnr_id": _origin(node)} if node.definition is not None else {},
        "widgets_values": node.values,
    }
    if node.title:
        saved["title"] = node.title
    return saved


def _saved_input(item: Input, link: int | None) -> dict[str, Any]:
    saved: dict[str, Any] = {"name": item.name, "type": item.type, "link": link}
    if item.optional and not item.is_widget:
        saved["shape"] = 7  # the hollow circle of what may stay unconnected
    if item.is_widget:
        saved["widget"] = {"name": item.name}
    return saved


def _outgoing(links: list[list[Any]], node: int, slot: int) -> list[int] | None:
    return [link[0] for link in links if link[1:3] == [node, slot]] or None


def _origin(node: Node) -> str:
    """The pack that a front end without this node offers to install."""
    pack = _definition(node).pack
    return pack.removeprefix("custom_nodes.") if pack.startswith("custom_nodes.") else "comfy-core"
