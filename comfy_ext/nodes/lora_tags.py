"""LoRA tags in a prompt: ``<lora:name>``, ``<lora:name:weight>``, ``<lora:name:weight:clip_weight>``.

Text in, clean text and tags out; knows neither files nor ComfyUI. As in A1111 a tag never reaches the text encoder,
not even one that cannot be read: that one is left out, with a complaint. One that is never closed is text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .lora_entry import LoraEntry

_TAG = re.compile(r"<\s*lora\s*:([^<>\n]*)>", re.IGNORECASE)
_UNCLOSED = re.compile(r"<\s*lora\s*:[^<>\n,]{0,40}", re.IGNORECASE)
_BLANK = " \t"


@dataclass(frozen=True)
class TaggedText:
    """``text`` without its tags; ``loras`` in order of appearance; ``complaints`` are whole sentences."""

    text: str
    loras: tuple[LoraEntry, ...] = ()
    complaints: tuple[str, ...] = ()


def parse(text: str) -> TaggedText:
    """Text without a tag comes back as it is, to the character."""
    loras, complaints = [], []
    while (tag := _TAG.search(text)) is not None:  # from the start: what is around a tag may make another
        entry = _entry(tag[1])
        if entry is None:
            complaints.append(f"{tag[0]} is not <lora:name:weight> or <lora:name:weight:clip_weight>, left out")
        else:
            loras.append(entry)
        text = _without(text[: tag.start()], text[tag.end() :])
    complaints += [f"'{start.strip()}' has no closing '>' and stays in the text" for start in _UNCLOSED.findall(text)]
    return TaggedText(text, tuple(loras), tuple(complaints))


def _entry(inside: str) -> LoraEntry | None:
    """Of what is between ``<lora:`` and ``>``; None for what is none. A weight may be infinite or NaN."""
    name, *weights = (part.strip() for part in inside.split(":"))
    if not name or len(weights) > 2:
        return None
    try:
        numbers = [float(weight) for weight in weights] or [1.0]
    except ValueError:
        return None
    return LoraEntry(name, numbers[0], numbers[-1])


def _without(before: str, after: str) -> str:
    """Both sides of a removed tag, as one would have written them without it: no comma or blank too many."""
    left, right = before.rstrip(_BLANK), after.lstrip(_BLANK)
    if left[-1:] in ("", ",", "\n") and right[:1] == ",":  # it was an item of a list
        return before + right[1:].lstrip(_BLANK)
    if not right.strip():
        return left.removesuffix(",") + right
    if right[0] in "\n,.":
        return left + right
    return before + (right if left != before or left[-1:] in ("", "\n") else after)
