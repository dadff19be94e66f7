"""Which LoRAs are to be applied: stack and tags made one list, no file twice. Knows neither disk nor ComfyUI."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from .lora_entry import LoraEntry
from .lora_names import Found


@dataclass
class Plan:
    """``loras``: file -> who asked for it how, the stack's first, then those of the tags as they appear.

    ``missing``: names without a file. ``doubts``: names that mean several files; ``conflicts``: what was asked for
    otherwise, too. Both are sentences.
    """

    loras: dict[str, LoraEntry] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)


def plan(stack: Iterable[LoraEntry], tags: Iterable[LoraEntry], find: Callable[[str], Found]) -> Plan:
    """A tag wins over the stack, and of two tags or two of the stack the later one."""
    made = Plan()
    asked_by: dict[str, str] = {}
    for source, entries in (("stack", stack), ("tag", tags)):
        for entry in entries:
            file = _file(entry.name, find(entry.name), made)
            if file is None:
                continue
            before = made.loras.get(file)
            if before is not None and before.strengths != entry.strengths:
                made.conflicts.append(
                    f"LoRA '{file}' is applied once: {_of(source, entry)} win over {_of(asked_by[file], before)}"
                )
            made.loras[file], asked_by[file] = entry, source
    return made


def _of(source: str, entry: LoraEntry) -> str:
    return f"the {source}'s strengths {entry.strengths}"


def _file(name: str, found: Found, made: Plan) -> str | None:
    """Notes what is to be said about the name, once however often it appears."""
    if found.file is None and name.casefold() not in (missing.casefold() for missing in made.missing):
        made.missing.append(name)
    doubt = f"LoRA '{name}' {found.doubt}" if found.doubt else ""
    if doubt and doubt not in made.doubts:
        made.doubts.append(doubt)
    return found.file
