"""A saved workflow as the API format that a server runs, as the front end makes it of the same file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.pack.definitions import Definition
from bench.workflows import Graph

VIRTUAL = ("Note", "MarkdownNote")


def prompt(saved: Mapping[str, Any], definitions: Mapping[str, Definition]) -> Graph:
    """Raises ValueError where the widgets that were saved are not those of the node's class."""
    links = {link[0]: [str(link[1]), link[2]] for link in saved["links"]}
    graph: Graph = {}
    for node in saved["nodes"]:
        if node["type"] in VIRTUAL:
            continue
        inputs = _widgets(node, definitions[node["type"]])
        inputs |= {slot["name"]: links[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        graph[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return graph


def _widgets(node: Mapping[str, Any], definition: Definition) -> dict[str, Any]:
    values = list(node["widgets_values"])
    found = {}
    for item in definition.widgets:
        if not values:
            raise ValueError(f"{node['type']} {node['id']}: no value for {item.name}")
        found[item.name] = values.pop(0)
        if item.has_control:
            values.pop(0)
    if values:
        raise ValueError(f"{node['type']} {node['id']}: values of no widget: {values}")
    return found
