"""English texts of the nodes for ComfyUI's translations, as a translator copies them: what the classes say, no more.

The front end compiles such texts as vue-i18n messages, in which some characters have a meaning. A text with one of
them is left out: then the front end shows what the class says, which is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.pack.definitions import Definition

SPECIAL = "{}@|<>"
CATEGORY = "Luna"


def node_definitions(definitions: Mapping[str, Definition], pack: str) -> dict[str, Any]:
    """nodeDefs.json."""
    ours = {kind: definition for kind, definition in definitions.items() if definition.pack == pack}
    return {kind: _node(ours[kind]) for kind in sorted(ours)}


def main() -> dict[str, Any]:
    """main.json."""
    return {"nodeCategories": {CATEGORY: CATEGORY}}


def _node(definition: Definition) -> dict[str, Any]:
    return {
        "display_name": definition.display_name,
        **_plain("description", definition.description),
        "inputs": {
            item.name: {"name": item.name} | _plain("tooltip", str(item.options.get("tooltip", "")))
            for item in definition.inputs
        },
        "outputs": {
            str(index): {"name": output.name} | _plain("tooltip", output.tooltip)
            for index, output in enumerate(definition.outputs)
        },
    }


def _plain(key: str, text: str) -> dict[str, str]:
    return {key: text} if text and not set(SPECIAL) & set(text) else {}
