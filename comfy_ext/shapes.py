"""Shapes that ComfyUI's patches were made for, and what they make of a weight's. Reads no weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.weight_adapter import WeightAdapterBase

Patch = tuple[float, Any, float, tuple[int, int, int] | None, Any]
"""strength, value, strength_model, offset, function: as ``ModelPatcher.patches`` holds it."""


def region_shape(shape: Sequence[int], offset: tuple[int, int, int] | None) -> list[int]:
    """Of the part of a weight that a patch with this offset speaks of."""
    part = list(shape)
    if offset is not None:
        part[offset[0]] = offset[2]
    return part


def grown_shape(patches: Sequence[Patch], shape: Sequence[int]) -> tuple[int, ...]:
    """The weight's shape once ``patches`` are applied: some make it grow."""
    grown = tuple(shape)
    for patch in patches:
        if reshapes(patch, grown):
            value = patch[1]
            adapter = isinstance(value, WeightAdapterBase)
            grown = tuple(value.weights[5] if adapter else _difference(value)[0].shape)
    return grown


def shape_of(value: Any, layer: list[int]) -> tuple[int, ...] | None:
    """The shape of the weight that a patch was made for, a kernel perhaps flattened; None where any will do.

    Kinds that speak of a part of the shape only get the rest from ``layer``.
    """
    if isinstance(value, WeightAdapterBase):
        return _adapter_shape(value.name, value.weights, layer)
    if not isinstance(value, tuple) or isinstance(value[0], list):
        return None
    difference, pads = _difference(value)
    return None if pads else tuple(difference.shape)


def misfit(value: Any, layer: list[int]) -> tuple[int, ...] | None:
    """The shape that a patch was made for, where it has not as many elements as ``layer``; None if it can fit."""
    theirs = shape_of(value, layer)
    return None if theirs is None or torch.Size(theirs).numel() == torch.Size(layer).numel() else theirs


def _difference(value: Any) -> tuple[torch.Tensor, bool]:
    """The tensor of a "diff", a "set" or a "model_as_lora", and whether the weight is padded to its shape."""
    data = value[1] if len(value) == 2 else value
    return data[0], len(data) > 1 and isinstance(data[1], dict) and bool(data[1].get("pad_weight"))


def _adapter_shape(kind: str, weights: Any, layer: list[int]) -> tuple[int, ...] | None:
    if kind == "lora":
        up, down, _, mid, _, reshape = weights
        if reshape is not None:
            return None
        kernel = 1 if mid is None else mid[0, 0].numel()
        return up.shape[0], down[:1].numel() * kernel * up[0].numel() // down.shape[0]
    if kind == "loha":
        w1a, w1b, _, _, _, t1, *_ = weights
        return (w1a.shape[0], w1b.shape[1]) if t1 is None else (w1a.shape[1], w1b.shape[1], *t1.shape[2:])
    if kind == "lokr":
        w1, w2, _, w1a, w1b, w2a, w2b, t2, _ = weights
        first = w1.shape if w1 is not None else (w1a.shape[0], w1b.shape[1])
        if w2 is not None:
            second = tuple(w2.shape)
        else:
            second = (w2a.shape[0], w2b.shape[1]) if t2 is None else (w2a.shape[1], w2b.shape[1], *t2.shape[2:])
        return first[0] * second[0], first[1] * second[1], *second[2:]
    if kind in ("oft", "boft"):
        blocks, size = weights[0].shape[-3:-1]
        return blocks * size, *layer[1:]
    if kind == "glora":
        _, _, b1, b2, *_ = weights
        old, new = (b2.shape[0], b1[:1].numel()), (b1.shape[0], b2[:1].numel())
        return old if old == (layer[0], torch.Size(layer[1:]).numel()) else new
    return None


def reshapes(patch: Patch, shape: tuple[int, ...]) -> bool:
    """A LoRA with ``reshape_weight``, or a difference that pads: the weight grows."""
    _, value, _, offset, _ = patch
    if offset is not None or isinstance(value, list):
        return False
    if isinstance(value, WeightAdapterBase):
        wanted = value.weights[5] if value.name == "lora" else None
        return wanted is not None and tuple(wanted) != shape
    difference, pads = _difference(value)
    return pads and tuple(difference.shape) != shape
