"""Which layer of a model a name in a LoRA file means. Knows names and modules, no factors.

A name is taken literally first, then without the components that files put before it (``unet.``, ``lora_te1_``).
Kohya's names have ``_`` for every dot: they are compared with the modules' names written the same way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from lunashm.client.lora_file import listed
from lunashm.errors import LoraMismatch

_KOHYA = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_transformer_", "lora_unet_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}
"""What kohya's scripts call the components that diffusers names so."""

_COMPONENTS = (
    "base_model.model.", "base_model.", "model.diffusion_model.", "diffusion_model.",
    *(f"{component}." for component in _KOHYA), *sorted({p for prefixes in _KOHYA.values() for p in prefixes}),
    "lycoris_", "lora_",
    "text_model.", "text_model_",  # a level that transformers 5 no longer has
)  # fmt: skip


@dataclass(frozen=True)
class Layer:
    """A module with a weight, and its name in the model."""

    name: str
    module: torch.nn.Module

    @property
    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.module.get_parameter("weight")
        return weight


@dataclass(frozen=True)
class Matches:
    """``layers`` by the file's name for each; ``unmatched`` are names that mean no layer."""

    layers: Mapping[str, Layer]
    unmatched: tuple[str, ...]


def match(names: Iterable[str], models: Sequence[torch.nn.Module], prefix: str = "") -> Matches:
    """Find the layer of ``models`` that each of ``names`` means.

    With ``prefix``, only names of that part of the file count: ``text_encoder_2`` means ``text_encoder_2.`` and
    ``lora_te2_``. Raises LoraMismatch where a name may mean two layers, or two names mean one.
    """
    exact, flat = _index(models)
    found: dict[str, Layer] = {}
    taken: dict[int, str] = {}
    unmatched = []
    for name in names:
        table = flat if name.startswith(("lora_", "lycoris_")) and "." not in name else exact
        candidates = next((table[spelling] for spelling in _spellings(name, prefix) if spelling in table), None)
        if candidates is None:
            if _is_part(name, prefix):
                unmatched.append(name)
            continue
        if len(candidates) > 1:
            places = listed(layer.name for layer in candidates)
            raise LoraMismatch(f"{name} may mean {len(candidates)} layers ({places}); say which module=")
        layer = candidates[0]
        other = taken.setdefault(id(layer.module), name)
        if other != name:
            raise LoraMismatch(f"{other} and {name} both mean {layer.name}; say which part of the file with prefix=")
        found[name] = layer
    return Matches(found, tuple(unmatched))


def _index(models: Sequence[torch.nn.Module]) -> tuple[dict[str, list[Layer]], dict[str, list[Layer]]]:
    """Layers by name, and by name with ``_`` for dots; each module once, under each of its names."""
    exact: dict[str, list[Layer]] = {}
    flat: dict[str, list[Layer]] = {}
    for model in models:
        for name, module in model.named_modules(remove_duplicate=False):
            if isinstance(module._parameters.get("weight"), torch.Tensor):
                for table, key in ((exact, name), (flat, name.replace(".", "_"))):
                    known = table.setdefault(key, [])
                    if all(layer.module is not module for layer in known):
                        known.append(Layer(name, module))
    return exact, flat


def _spellings(name: str, prefix: str) -> Iterator[str]:
    """``name`` without nothing, one, two... of the components before it; without ``prefix`` from the start."""
    rest: str | None = _without(name.removeprefix("base_model.model."), _starts(prefix)) if prefix else name
    while rest:
        yield rest
        rest = _without(rest, _COMPONENTS)


def _is_part(name: str, prefix: str) -> bool:
    return not prefix or _without(name.removeprefix("base_model.model."), _starts(prefix)) is not None


def _starts(prefix: str) -> tuple[str, ...]:
    """How names of the part ``prefix`` begin, in every style."""
    part = prefix.rstrip("._")
    flat = part.replace(".", "_")
    return f"{part}.", *_KOHYA.get(part, ()), f"lora_{flat}_", f"lycoris_{flat}_", f"{flat}_"


def _without(name: str, starts: Sequence[str]) -> str | None:
    """``name`` after the first of ``starts`` that it begins with; None for none."""
    start = next((start for start in starts if name.startswith(start)), None)
    return None if start is None else name.removeprefix(start)
