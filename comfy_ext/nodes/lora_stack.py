"""LORA_STACK, the list of (name, model strength, CLIP strength) that many packs pass on: reading it, and its node."""

from __future__ import annotations

from numbers import Real
from typing import Any

from . import lora_files
from .lora_entry import LoraEntry

NONE = "None"
_SLOTS = range(1, 6)
_STRENGTH = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.01}

Stack = list[tuple[str, float, float]]


def read(stack: Any) -> list[LoraEntry]:
    """Without the empty places that other packs leave. Raises ValueError with what it got instead of a stack."""
    if stack is None:
        return []
    if not isinstance(stack, list | tuple):
        raise ValueError(f"lora_stack must be a list of (name, model strength, CLIP strength), but is {_shown(stack)}")
    entries = [_entry(place, given) for place, given in enumerate(stack, 1)]
    return [entry for entry in entries if entry is not None]


def _entry(place: int, given: Any) -> LoraEntry | None:
    if given is None:
        return None
    if not isinstance(given, list | tuple) or len(given) != 3:
        raise ValueError(_wrong(place, given))
    name, *strengths = given
    if name is None or name in ("", NONE):
        return None
    if not isinstance(name, str) or not all(isinstance(s, Real) and not isinstance(s, bool) for s in strengths):
        raise ValueError(_wrong(place, given))
    return LoraEntry(name, *map(float, strengths))


def _wrong(place: int, given: Any) -> str:
    return f"place {place} of lora_stack must be (name, model strength, CLIP strength), but is {_shown(given)}"


def _shown(given: Any) -> str:
    text = repr(given)
    return f"{text[:80]}{'...' * (len(text) > 80)} ({type(given).__name__})"


class LunaLoRAStack:
    """Five places; chained, as many as one likes."""

    DESCRIPTION = "LoRAs with strengths, for the Luna Config Gateway and for other packs' nodes that take a LORA_STACK."
    CATEGORY = "Luna"
    FUNCTION = "stack"
    RETURN_TYPES = ("LORA_STACK",)
    RETURN_NAMES = ("lora_stack",)
    OUTPUT_TOOLTIPS = ("The stack that came in, and after it the LoRAs chosen here.",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        names = [NONE, *lora_files.listed()]
        optional: dict[str, Any] = {"lora_stack": ("LORA_STACK", {"tooltip": "A stack to add to."})}
        for n in _SLOTS:
            what = {"tooltip": f"LoRA {n}, or None for an empty place."}
            model = {"tooltip": f"How strongly LoRA {n} changes the model; 0 not at all, below 0 the other way."}
            clip = {"tooltip": f"How strongly LoRA {n} changes the text encoders."}
            optional[f"lora_{n}"] = (names, {"default": NONE} | what)
            optional[f"model_strength_{n}"] = ("FLOAT", _STRENGTH | model)
            optional[f"clip_strength_{n}"] = ("FLOAT", _STRENGTH | clip)
        return {"required": {}, "optional": optional}

    def stack(self, lora_stack: Any = None, **chosen: Any) -> tuple[Stack]:
        given = [(chosen.get(f"lora_{n}"), *(chosen.get(f"{half}_strength_{n}", 1.0) for half in ("model", "clip")))
                 for n in _SLOTS]  # fmt: skip
        entries = [*read(lora_stack), *read(given)]
        return ([(entry.name, entry.model_strength, entry.clip_strength) for entry in entries],)
