"""ComfyUI's patches as updates of a layer. Reads weights, writes none.

A patch is ``(strength, value, strength_model, offset, function)`` as ``ModelPatcher.patches`` holds it, and the meaning
of each is ComfyUI's own: ``comfy.lora.calculate_weight`` and ``comfy.weight_adapter`` of 0.28. What has a low-rank or
Kronecker form becomes one; everything else is a dense step: ComfyUI's own function makes the weight for one call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import comfy.lora
import torch
from comfy.weight_adapter import WeightAdapterBase

from lunashm.client.lowrank import UnsupportedLayer, Update

from .shapes import Patch, misfit, region_shape, reshapes

MAX_LOHA_RANK = 256
"""Rank of the exact low-rank form of a LoHa (the product of its two ranks) up to which that form is used."""


def update_of(patches: Sequence[Patch], weight: torch.Tensor, key: str, originals: Any = None) -> Update:
    """All patches of one weight, in order, as one update.

    ``originals``: what ``get_key_patches`` returns, for a ``model_as_lora``. Raises UnsupportedLayer where a patch
    gives the weight another shape.
    """
    update = Update(tuple(weight.shape))
    if any(reshapes(patch, update.shape) for patch in patches):
        raise UnsupportedLayer("a patch that gives the weight another shape")
    for patch in patches:
        theirs = misfit(patch[1], region_shape(update.shape, patch[3]))
        if theirs is not None:
            raise UnsupportedLayer(f"a patch of shape {list(theirs)} for {list(update.shape)}")
        try:
            _add(patch, update, weight)
        except UnsupportedLayer:
            update.then(_by_comfy(patch, key, originals))
    return update


def _by_comfy(patch: Patch, key: str, originals: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def calculate(weight: torch.Tensor) -> torch.Tensor:
        return comfy.lora.calculate_weight([patch], weight, key, original_weights=originals)

    return calculate


def _add(patch: Patch, update: Update, weight: torch.Tensor) -> None:
    """Raises UnsupportedLayer, with nothing added, where the patch has no low-rank form."""
    strength, value, strength_model, offset, function = patch
    region = Region(update, offset, function)
    if strength == 0.0 and not _replaces(value):
        terms: list[Callable[[], None]] = []
    elif isinstance(value, WeightAdapterBase):
        terms = _adapter(value, strength, region, weight)
    else:
        raise UnsupportedLayer("not an adapter")
    if strength_model != 1.0:
        region.scale(strength_model)
    for term in terms:
        term()


def _replaces(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and value[0] == "set"


class Region:
    """The part of a weight that a patch with an offset (dimension, start, length) speaks of; without one, all of it.

    ``function`` rearranges the rows of what is added.
    """

    def __init__(self, update: Update, offset: tuple[int, int, int] | None, function: Any = None) -> None:
        self.update = update
        self._offset = offset
        if offset is not None and offset[0] not in (0, 1):
            raise UnsupportedLayer(f"a part along dimension {offset[0]}")
        self.shape = tuple(region_shape(update.shape, offset))
        self._order = None if function is None else row_order(function, self.shape)

    def scale(self, factor: float) -> None:
        ones = torch.ones(self.shape[self._dimension])
        (self.scale_columns if self._dimension == 1 else self.scale_rows)(ones * factor)

    def scale_rows(self, factor: torch.Tensor) -> None:
        self.update.scale_rows(self._spread(factor, self.update.shape[0]))

    def scale_columns(self, factor: torch.Tensor) -> None:
        self.update.scale_columns(self._spread(factor, self.update.shape[1]))

    def check_scalable(self, dimension: int) -> None:
        """Scales of a part are one vector of the whole weight only along the dimension that it is a part of."""
        if self._offset is not None and self._dimension != dimension:
            raise UnsupportedLayer("a part of the weight is scaled across")

    def rows(self, up: torch.Tensor) -> torch.Tensor:
        """``up`` with its rows where the patch's function puts them."""
        return up if self._order is None else up[self._order.to(up.device)]

    def add(self, up: torch.Tensor, down: torch.Tensor, factor: float, *, owned: bool = False) -> None:
        self.update.add(self.rows(up), down, factor, owned=owned or self._order is not None, **self._place)

    def add_kronecker(self, first: torch.Tensor, second: Any, factor: float) -> None:
        self.update.add_kronecker(first, second, factor, **self._place)

    def check_unordered(self) -> None:
        if self._order is not None:
            raise UnsupportedLayer("rearranged rows")

    def current(self, weight: torch.Tensor) -> torch.Tensor:
        """This part of the weight as the patches so far make it, float32."""
        merged = self.update.apply_to(weight)
        return merged if self._offset is None else merged.narrow(*self._offset)

    @property
    def _dimension(self) -> int:
        return 0 if self._offset is None else self._offset[0]

    @property
    def _place(self) -> dict[str, tuple[int, int]]:
        if self._offset is None:
            return {}
        return {("rows", "columns")[self._dimension]: (self._offset[1], self._offset[2])}

    def _spread(self, factor: torch.Tensor, length: int) -> torch.Tensor:
        if self._offset is None:
            return factor
        whole = torch.ones(length, device=factor.device)
        whole.narrow(0, *self._offset[1:]).copy_(factor)
        return whole


def row_order(function: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Which row each row of ``function``'s result was. Raises UnsupportedLayer if it does anything but move rows."""
    try:
        numbers = torch.arange(shape[0], dtype=torch.float64).reshape(-1, *[1] * (len(shape) - 1))
        probe = torch.cat([numbers, -2.0 * numbers - 1.0], dim=1)  # two columns that tell rows from columns
        result = function(probe.clone())
        order = result[:, :1].flatten().long()
    except Exception as exc:
        raise UnsupportedLayer("a function that is more than an order of rows") from exc
    whole = torch.equal(order.sort().values, torch.arange(shape[0]))
    if not whole or not torch.equal(result, probe[order]):
        raise UnsupportedLayer("a function that is more than an order of rows")
    return order


Terms = list[Callable[[], None]]
"""What a patch adds, to be run once the weight's own scale (``strength_model``) is in place."""


def _adapter(adapter: Any, strength: float, region: Region, weight: torch.Tensor) -> Terms:
    """Raises UnsupportedLayer before anything is added."""
    if adapter.name == "lora":
        up, down, factor, magnitude, owned = _lora(adapter.weights)
    elif adapter.name == "loha":
        up, down, factor, magnitude, owned = _loha(adapter.weights)
    elif adapter.name == "lokr":
        return _lokr(adapter.weights, strength, region)
    elif adapter.name == "glora":
        return _glora(adapter.weights, strength, region, weight)
    else:
        raise UnsupportedLayer(f"a {adapter.name} adapter")
    if up.shape[0] != region.shape[0] or down[:1].numel() != torch.Size(region.shape[1:]).numel():
        raise UnsupportedLayer(f"factors {list(up.shape)} x {list(down.shape)} for {list(region.shape)}")
    if magnitude is None:
        return [lambda: region.add(up, down, strength * factor, owned=owned)]
    region.check_scalable(0 if magnitude.shape[0] == region.shape[0] else 1)
    return [lambda: _dora(up, down, factor, magnitude, strength, region, weight)]


def _lora(weights: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None, bool]:
    """up, down, alpha, mid, dora_scale, reshape. ``mid`` is LoCon's: it is folded into ``down``."""
    up, down, alpha, mid, magnitude, _ = weights
    factor = alpha / down.shape[0] if alpha is not None else 1.0
    if mid is None:
        return up.flatten(1), down.flatten(1), factor, magnitude, False
    final = [down.shape[1], down.shape[0], *mid.shape[2:]]
    flat = down.float().transpose(0, 1).flatten(1) @ mid.float().transpose(0, 1).flatten(1)
    return up.flatten(1), flat.reshape(final).transpose(0, 1).flatten(1), factor, magnitude, True


def _loha(weights: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor, float, torch.Tensor | None, bool]:
    """(w1a w1b) * (w2a w2b) = sum over i, j of (w1a_i * w2a_j)(w1b_i * w2b_j): the Khatri-Rao product, rank r1 r2."""
    w1a, w1b, alpha, w2a, w2b, t1, _, magnitude = weights
    if t1 is not None:
        raise UnsupportedLayer("a LoHa in CP form")
    rank = w1b.shape[0] * w2b.shape[0]
    if rank > MAX_LOHA_RANK:
        raise UnsupportedLayer(f"a LoHa whose low-rank form has rank {rank}")
    up = (w1a.float()[:, :, None] * w2a.float()[:, None, :]).flatten(1)
    down = (w1b.float()[:, None, :] * w2b.float()[None, :, :]).flatten(0, 1)
    return up, down, alpha / w1b.shape[0] if alpha is not None else 1.0, magnitude, True


def _lokr(weights: Sequence[Any], strength: float, region: Region) -> Terms:
    """kron(w1, w2): each given whole or as two factors, w2 with a kernel also as Tucker's three (t2)."""
    w1, w2, alpha, w1a, w1b, w2a, w2b, t2, magnitude = weights
    if magnitude is not None:
        raise UnsupportedLayer("a LoKr with DoRA")
    region.check_unordered()
    dim = None
    if w1 is None:
        dim, w1 = w1b.shape[0], w1a.float() @ w1b.float()
    if w2 is None:
        dim = w2b.shape[0]
        if t2 is not None:
            w2 = torch.einsum("ijkl,jr,ip->prkl", t2.float(), w2b.float(), w2a.float())
        elif len(region.shape) == 2:
            w2 = (w2a, w2b)
        else:
            w2 = w2a.float() @ w2b.float()
    if isinstance(w2, torch.Tensor) and w2.dim() != len(region.shape):
        w2 = w2.reshape(w2.shape[0], region.shape[1] // w1.shape[1], *region.shape[2:])
    factor = strength * (alpha / dim if alpha is not None and dim is not None else 1.0)
    second_rows = (w2[0] if isinstance(w2, tuple) else w2).shape[0]
    if w1.dim() != 2 or w1.shape[0] * second_rows != region.shape[0]:
        raise UnsupportedLayer("a LoKr of another shape")
    return [lambda: region.add_kronecker(w1, w2, factor)]


def _glora(weights: Sequence[Any], strength: float, region: Region, weight: torch.Tensor) -> Terms:
    """W + s (W a1 a2 + b1 b2) of a linear layer; W a1 is one product now, not one per call.

    The old LyCORIS form has the roles of each pair exchanged. ComfyUI tells them apart by shapes alone.
    """
    a1, a2, b1, b2, alpha, magnitude = weights
    if magnitude is not None or weight.dim() != 2:
        raise UnsupportedLayer("a GLoRA of a convolution, or with DoRA")
    region.check_unordered()
    a1, a2, b1, b2 = (tensor.flatten(1) for tensor in (a1, a2, b1, b2))
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    new = b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0]
    if old and (not new or a2.shape[0] == region.shape[0] == region.shape[1]):
        rank = a1.shape[0]
        a1, a2, b1, b2 = a2, a1, b2, b1
    else:
        rank = a2.shape[0]
    factor = strength * (alpha / rank if alpha is not None else 1.0)

    def add() -> None:
        projected = region.current(weight) @ a1.to(weight.device, torch.float32)
        region.add(projected, a2, factor, owned=True)
        region.add(b1, b2, factor)

    return [add]


def _dora(
    up: torch.Tensor,
    down: torch.Tensor,
    factor: float,
    magnitude: torch.Tensor,
    strength: float,
    region: Region,
    weight: torch.Tensor,
) -> None:
    """W' = (1 - s) W + s e * (W + dW), e = magnitude / norm.

    The norm is ComfyUI's: of W's rows for a magnitude per output, of (W + dW)'s columns for one per input.
    """
    current = region.current(weight)
    device = current.device
    up, down = region.rows(up.to(device, torch.float32)), down.to(device, torch.float32)
    per_output = magnitude.shape[0] == current.shape[0]  # ComfyUI's rule: (out, 1) or (1, in)
    magnitude = magnitude.to(device, torch.float32).flatten()
    epsilon = torch.finfo(torch.float32).eps
    if per_output:
        e = magnitude / (current.flatten(1).norm(dim=1) + epsilon)
        region.scale_rows((1.0 - strength) + strength * e)
        up = up * e[:, None]
    else:
        delta = (up @ down.flatten(1)).reshape(current.shape) * factor
        e = magnitude / ((current + delta).transpose(0, 1).flatten(1).norm(dim=1) + epsilon)
        region.scale_columns((1.0 - strength) + strength * e)
        down = down.reshape(-1, *current.shape[1:]) * e.reshape(1, -1, *[1] * (current.dim() - 2))
    region.update.add(up, down, strength * factor, owned=True, **region._place)
