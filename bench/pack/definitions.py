"""What a node has, read from a server's /object_info: sockets, widgets, outputs; the same for all ComfyUIs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
SEEDS = ("seed", "noise_seed")


@dataclass(frozen=True)
class Input:
    """``choices`` of a combo; ``options`` as the node's class declares them."""

    name: str
    type: str
    options: Mapping[str, Any]
    optional: bool = False
    choices: tuple[Any, ...] = ()

    @property
    def is_widget(self) -> bool:
        return self.type in WIDGET_TYPES and not self.options.get("forceInput")

    @property
    def is_text(self) -> bool:
        """A box of several lines."""
        return self.type == "STRING" and bool(self.options.get("multiline"))

    @property
    def has_control(self) -> bool:
        """Whether the front end puts a second widget below it: what becomes of the seed after each run."""
        return self.is_widget and bool(self.options.get("control_after_generate", self.name in SEEDS))


@dataclass(frozen=True)
class Output:
    name: str
    type: str
    tooltip: str = ""


@dataclass(frozen=True)
class Definition:
    """One class of nodes."""

    kind: str
    display_name: str
    description: str
    pack: str
    inputs: tuple[Input, ...] = field(default=())
    outputs: tuple[Output, ...] = field(default=())

    @property
    def sockets(self) -> list[Input]:
        return [item for item in self.inputs if not item.is_widget]

    @property
    def widgets(self) -> list[Input]:
        return [item for item in self.inputs if item.is_widget]

    def input(self, name: str) -> Input:
        """Raises KeyError naming what there is."""
        found = next((item for item in self.inputs if item.name == name), None)
        if found is None:
            raise KeyError(f"{self.kind} has no input {name}: {', '.join(item.name for item in self.inputs)}")
        return found

    def output(self, name: str) -> int:
        """The index; names in any case. Raises KeyError naming what there is."""
        names = [output.name.lower() for output in self.outputs]
        if name.lower() not in names:
            raise KeyError(f"{self.kind} has no output {name}: {', '.join(names)}")
        return names.index(name.lower())


def definitions(object_info: Mapping[str, Any]) -> dict[str, Definition]:
    """Of every class of nodes that a server knows."""
    return {kind: _definition(kind, info) for kind, info in object_info.items()}


def _definition(kind: str, info: Mapping[str, Any]) -> Definition:
    tooltips = info.get("output_tooltips") or ()
    outputs = [
        Output(name, type_ if isinstance(type_, str) else "COMBO", tooltips[index] if index < len(tooltips) else "")
        for index, (name, type_) in enumerate(zip(info["output_name"], info["output"], strict=True))
    ]
    return Definition(
        kind, info.get("display_name") or kind, info.get("description") or "", info["python_module"],
        tuple(_inputs(info["input"])), tuple(outputs),
    )  # fmt: skip


def _inputs(sections: Mapping[str, Any]) -> Iterator[Input]:
    for section in ("required", "optional"):
        for name, spec in (sections.get(section) or {}).items():
            type_, options = spec[0], spec[1] if len(spec) > 1 else {}
            if isinstance(type_, list):  # a combo, as classes of ComfyUI's first schema declare it
                yield Input(name, "COMBO", options, section == "optional", tuple(type_))
            else:
                choices = tuple(options.get("options") or ()) if type_ == "COMBO" else ()
                yield Input(name, type_, options, section == "optional", choices)
