"""ComfyUI's patches as low-rank updates. Reads weights, writes none; what has no low-rank form is said to have none.

A patch is ``(strength, value, strength_model, offset, function)`` as ``ModelPatcher.patches`` holds it, and the meaning
of each is ComfyUI's own: ``comfy.lora.calculate_weight`` and ``comfy.weight_adapter`` of 0.28.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from comfy.weight_adapter import WeightAdapterBase

from lunashm.client.lowrank import UnsupportedLayer, Update

MAX_LOHA_RANK = 256
"""Rank of the exact low-rank form of a LoHa (the product of its two ranks) up to which that form is used."""

Patch = tuple[float, Any, float, tuple[int, int, int] | None, Any]


def update_of(patches: Sequence[Patch], weight: torch.Tensor) -> Update:
    """All patches of one weight, in order, as one update. Raises UnsupportedLayer where one has no low-rank form."""
    update = Update(tuple(weight.shape))
    for strength, value, strength_model, offset, function in patches:
        if function is not None:
            raise UnsupportedLayer("a patch that rearranges the weight")
        region = _Region(update, offset)
        if strength_model != 1.0:
            region.scale(strength_model)
        if not isinstance(value, WeightAdapterBase):
            raise UnsupportedLayer(f"a patch of kind {_kind(value)}")
        if strength != 0.0:
            _adapt(value, strength, region, weight)
    return update


class _Region:
    """The part of a weight that a patch with an offset (dimension, start, length) speaks of; without one, all of it."""

    def __init__(self, update: Update, offset: tuple[int, int, int] | None) -> None:
        self.update = update
        self._offset = offset
        shape = list(update.shape)
        if offset is not None:
            dimension, _, length = offset
            if dimension not in (0, 1):
                raise UnsupportedLayer(f"a patch of a part along dimension {dimension}")
            shape[dimension] = length
        self.shape = tuple(shape)

    def scale(self, factor: float) -> None:
        ones = torch.ones(self.shape[self._dimension])
        (self.scale_columns if self._dimension == 1 else self.scale_rows)(ones * factor)

    def scale_rows(self, factor: torch.Tensor) -> None:
        if self._dimension == 1 and self._offset is not None:
            raise UnsupportedLayer("rows of a part of the columns are scaled")
        self.update.scale_rows(self._spread(factor, self.update.shape[0]))

    def scale_columns(self, factor: torch.Tensor) -> None:
        if self._dimension == 0 and self._offset is not None:
            raise UnsupportedLayer("columns of a part of the rows are scaled")
        self.update.scale_columns(self._spread(factor, self.update.shape[1]))

    def add(self, up: torch.Tensor, down: torch.Tensor, factor: float) -> None:
        """Factors of this part, padded with zeros to the whole weight."""
        up, down = up.float(), down.float().reshape(down.shape[0], *self.shape[1:])
        if up.shape[0] != self.shape[0]:
            raise UnsupportedLayer(f"factors of {up.shape[0]} rows for {self.shape[0]}")
        if self._offset is not None:
            dimension, start, length = self._offset
            whole = (up if dimension == 0 else down).new_zeros(
                *((self.update.shape[0], up.shape[1]) if dimension == 0 else (down.shape[0], *self.update.shape[1:]))
            )
            whole.narrow(dimension, start, length).copy_(up if dimension == 0 else down)
            up, down = (whole, down) if dimension == 0 else (up, whole)
        self.update.add(up, down, factor)

    def current(self, weight: torch.Tensor) -> torch.Tensor:
        """This part of the weight as the patches so far make it, float32."""
        merged = self.update.apply_to(weight)
        return merged if self._offset is None else merged.narrow(*self._offset)

    @property
    def _dimension(self) -> int:
        return 0 if self._offset is None else self._offset[0]

    def _spread(self, factor: torch.Tensor, length: int) -> torch.Tensor:
        if self._offset is None:
            return factor
        whole = torch.ones(length)
        whole.narrow(0, *self._offset[1:]).copy_(factor)
        return whole


def _kind(value: Any) -> str:
    if isinstance(value, tuple) and len(value) == 2:
        return str(value[0])
    return "model merge" if isinstance(value, list) else "diff"


def _adapt(adapter: WeightAdapterBase, strength: float, region: _Region, weight: torch.Tensor) -> None:
    if adapter.name == "lora":
        up, down, factor, magnitude = _lora(adapter.weights, region)
    elif adapter.name == "loha":
        up, down, factor, magnitude = _loha(adapter.weights)
    elif adapter.name == "glora":
        _glora(adapter.weights, strength, region, weight)
        return
    else:
        raise UnsupportedLayer(f"a {adapter.name} adapter")
    if magnitude is None:
        region.add(up, down, strength * factor)
    else:
        _dora(up, down, factor, magnitude, strength, region, weight)


def _lora(weights: Sequence[Any], region: _Region) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None]:
    """up, down, alpha, mid, dora_scale, reshape. ``mid`` is LoCon's: it is folded into ``down``."""
    up, down, alpha, mid, magnitude, reshape = weights
    if reshape is not None:
        raise UnsupportedLayer("a LoRA that reshapes the weight")
    factor = alpha / down.shape[0] if alpha is not None else 1.0
    if mid is not None:
        final = [down.shape[1], down.shape[0], mid.shape[2], mid.shape[3]]
        flat = down.float().transpose(0, 1).flatten(1) @ mid.float().transpose(0, 1).flatten(1)
        down = flat.reshape(final).transpose(0, 1)
    return up.flatten(1), down.flatten(1), factor, magnitude


def _loha(weights: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None]:
    """(w1a w1b) * (w2a w2b) = sum over i, j of (w1a_i * w2a_j)(w1b_i * w2b_j): the Khatri-Rao product, rank r1 r2."""
    w1a, w1b, alpha, w2a, w2b, t1, _, magnitude = weights
    if t1 is not None:
        raise UnsupportedLayer("a LoHa in CP form")
    rank = w1b.shape[0] * w2b.shape[0]
    if rank > MAX_LOHA_RANK:
        raise UnsupportedLayer(f"a LoHa whose low-rank form has rank {rank}")
    up = (w1a.float()[:, :, None] * w2a.float()[:, None, :]).flatten(1)
    down = (w1b.float()[:, None, :] * w2b.float()[None, :, :]).flatten(0, 1)
    return up, down, alpha / w1b.shape[0] if alpha is not None else 1.0, magnitude


def _glora(weights: Sequence[Any], strength: float, region: _Region, weight: torch.Tensor) -> None:
    """W + s (W a1 a2 + b1 b2) for a linear layer in the present form; W a1 is one product now, not one per call."""
    a1, a2, b1, b2, alpha, magnitude = weights
    if magnitude is not None or weight.dim() != 2 or a1.dim() != 2:
        raise UnsupportedLayer("a GLoRA of a convolution, or with DoRA")
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if not new or old:
        raise UnsupportedLayer("a GLoRA in the old LyCORIS form")
    factor = strength * (alpha / a2.shape[0] if alpha is not None else 1.0)
    projected = region.current(weight) @ a1.float()
    region.add(projected, a2, factor)
    region.add(b1, b2, factor)


def _dora(
    up: torch.Tensor,
    down: torch.Tensor,
    factor: float,
    magnitude: torch.Tensor,
    strength: float,
    region: _Region,
    weight: torch.Tensor,
) -> None:
    """W' = (1 - s) W + s e * (W + dW), e = magnitude / norm.

    The norm is ComfyUI's: of W's rows for a magnitude per output, of (W + dW)'s columns for one per input.
    """
    current = region.current(weight)
    epsilon = torch.finfo(torch.float32).eps
    if magnitude.shape[0] == current.shape[0]:
        e = magnitude.float().flatten() / (current.flatten(1).norm(dim=1) + epsilon)
        region.scale_rows((1.0 - strength) + strength * e)
        region.add(up.float() * e[:, None], down, strength * factor)
        return
    delta = (up.float() @ down.float().flatten(1)).reshape(current.shape) * factor
    e = magnitude.float().flatten() / ((current + delta).transpose(0, 1).flatten(1).norm(dim=1) + epsilon)
    region.scale_columns((1.0 - strength) + strength * e)
    spread = e.reshape(1, -1, *[1] * (current.dim() - 2))
    region.add(up, down.float().reshape(-1, *current.shape[1:]) * spread, strength * factor)
