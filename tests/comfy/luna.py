"""Graphs with Luna nodes, made of the stock ones that draw the same."""

from __future__ import annotations

import copy
from typing import Any

from bench.comfy_server import ComfyServer
from bench.workflows import Graph

SD15 = "sd15-tiny.safetensors"
ROUTER = {
    "model_source": "checkpoints", "model_name": SD15, "model_type": "auto", "precision": "auto", "daemon_mode": "auto",
}  # fmt: skip


def routed(graph: Graph, loader: str = "checkpoint", **inputs: object) -> Graph:
    """``graph`` with a LunaModelRouter in place of its checkpoint loader, and its status shown as text."""
    changed = copy.deepcopy(graph)
    changed[loader] = {"class_type": "LunaModelRouter", "inputs": ROUTER | inputs}
    return changed | {"status": show([loader, 4])}


def show(link: list[Any]) -> dict[str, Any]:
    return {"class_type": "PreviewAny", "inputs": {"source": link}}


def drawn(server: ComfyServer, graph: Graph, text: str = "status") -> tuple[bytes, str]:
    """The picture, and the text that the node ``text`` shows."""
    entry = server.run(graph)
    return server.image(entry), entry["outputs"][text]["text"][0]
