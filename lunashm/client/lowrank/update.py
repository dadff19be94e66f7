"""What a stack of adapters does to one weight, kept as small factors.

The form

    W -> p * W * q + B A + kroneckers      p: (out, 1) row scale, q: (1, in) column scale, B: (out, r), A: (r, in * k)

is what LoRA, LoCon, LoHa, LoKr, GLoRA, scalings of the base and DoRA (along either axis) never leave, in any order.
Everything else (a rotation, a full difference, a merge with another model) is a *dense* step: a function of the
weight so far. Neither copies the weight: who runs the layer adds the branch to its output, or makes the updated
weight for the length of one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from lunashm.client.lowrank.terms import Factors, Kronecker, Part, Scales

Dense = Callable[[torch.Tensor], torch.Tensor]
"""A step on the weight so far: float32, its own to change; returns the new one."""


Pair = tuple[torch.Tensor, torch.Tensor]
"""A (r, in, *kernel) and B (out, r)."""


class UnsupportedLayer(Exception):
    """This layer or update has no form that leaves the weight alone; the message says why."""


@dataclass
class Step:
    """One stretch of the form above, and the dense function that ends it, if any."""

    scales: Scales = field(default_factory=Scales)
    factors: list[Factors] = field(default_factory=list)
    kroneckers: list[Kronecker] = field(default_factory=list)
    dense: Dense | None = None

    @property
    def rank(self) -> int:
        return sum(term.rank for term in self.factors)

    @property
    def nbytes(self) -> int:
        terms = sum(f.nbytes for f in self.factors) + sum(k.nbytes for k in self.kroneckers)
        return self.scales.nbytes + terms

    @property
    def is_identity(self) -> bool:
        parts = (self.factors, self.kroneckers, self.dense, self.scales.row, self.scales.column)
        return all(part is None or part == [] for part in parts)

    @property
    def scaled(self) -> Iterator[Scales]:
        """The scales of the base and of every term so far."""
        yield self.scales
        for factors in self.factors:
            yield factors.scales
        for kronecker in self.kroneckers:
            yield kronecker.scales


class Update:
    """What a stack of adapters does to a weight of ``shape`` (out, in, *kernel); an identity when new.

    Terms are added in stack order: each acts on the result of those before it.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise UnsupportedLayer(f"a weight of shape {list(shape)} has no rows and columns")
        self.shape = tuple(shape)
        self._steps = [Step()]
        self._pairs: dict[tuple[torch.dtype, torch.device], Pair] = {}

    @property
    def step(self) -> Step:
        """The last stretch; the only one where there is no dense step."""
        return self._steps[-1]

    @property
    def is_dense(self) -> bool:
        """Whether only the updated weight itself will do: there is no branch."""
        return len(self._steps) > 1

    @property
    def is_identity(self) -> bool:
        return all(step.is_identity for step in self._steps)

    @property
    def rank(self) -> int:
        """Of all factors together."""
        return sum(step.rank for step in self._steps)

    @property
    def nbytes(self) -> int:
        """Private bytes that it holds: computed factors, scales, pairs; a file's tensors are the file's."""
        made = sum(tensor.nbytes for pair in self._pairs.values() for tensor in pair)
        return made + sum(step.nbytes for step in self._steps)

    @property
    def has_pairs(self) -> bool:
        """Whether :meth:`pair` was made and is held."""
        return bool(self._pairs)

    @property
    def pair_numel(self) -> int:
        """Elements of :meth:`pair`."""
        return self.rank * (self.shape[0] + self.columns)

    @property
    def columns(self) -> int:
        """in * kernel."""
        return torch.Size(self.shape[1:]).numel()

    def add(
        self,
        up: torch.Tensor,
        down: torch.Tensor,
        factor: float = 1.0,
        *,
        rows: Part | None = None,
        columns: Part | None = None,
        owned: bool = False,
    ) -> None:
        """W[rows, columns] += factor * up @ down, with ``up`` (out, r) and ``down`` (r, in * kernel or in, *kernel).

        The tensors are referred to, not copied; ``owned`` says that nobody else has them.
        Raises UnsupportedLayer naming both shapes where they do not fit.
        """
        rows, columns = rows or (0, self.shape[0]), columns or (0, self.shape[1])
        wanted = columns[1] * torch.Size(self.shape[2:]).numel()
        fits = up.dim() == 2 and up.shape[0] == rows[1] and down.shape[0] == up.shape[1]
        if not fits or down[:1].numel() != wanted:
            part = [rows[1], columns[1], *self.shape[2:]]
            raise UnsupportedLayer(f"factors {list(up.shape)} x {list(down.shape)} do not fit a weight of {part}")
        if factor != 0.0 and up.shape[1] > 0:
            self.step.factors.append(Factors(up.detach(), down.detach(), factor, rows, columns, owned))

    def add_kronecker(
        self,
        first: torch.Tensor,
        second: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        factor: float = 1.0,
        *,
        rows: Part | None = None,
        columns: Part | None = None,
    ) -> None:
        """W[rows, columns] += factor * kron(first, second); ``second`` (o2, i2, *kernel), or two factors of it.

        Raises UnsupportedLayer naming both shapes where they do not fit.
        """
        rows, columns = rows or (0, self.shape[0]), columns or (0, self.shape[1])
        term = Kronecker(first, second, factor, rows, columns)
        part = (rows[1], columns[1], *self.shape[2:])
        if term.shape != part:
            raise UnsupportedLayer(f"a Kronecker product of {list(term.shape)} does not fit a weight of {list(part)}")
        if factor != 0.0:
            self.step.kroneckers.append(term)

    def scale_rows(self, scale: torch.Tensor | float) -> None:
        """W = scale[:, None] * W, terms so far included; ``scale`` (out,) or a number."""
        factor = torch.as_tensor(scale, dtype=torch.float32).expand(self.shape[0])
        if not bool((factor == 1.0).all()):
            for scales in self.step.scaled:
                scales.scale_rows(factor)

    def scale_columns(self, scale: torch.Tensor | float) -> None:
        """W = W * scale[None, :], terms so far included; ``scale`` (in,) or a number."""
        factor = torch.as_tensor(scale, dtype=torch.float32).expand(self.shape[1])
        if not bool((factor == 1.0).all()):
            for scales in self.step.scaled:
                scales.scale_columns(factor)

    def then(self, function: Dense) -> None:
        """W = function(W), with W as it is so far, in float32, the function's own to change."""
        self.step.dense = function
        self._steps.append(Step())

    def pair(self, dtype: torch.dtype, device: torch.device) -> Pair:
        """A (r, in, *kernel) and B (out, r) of all factors after the last dense step; made once, then kept."""
        pair = self._pairs.get((dtype, device))
        if pair is None:
            with torch.inference_mode(False), torch.no_grad():
                pair = self._pairs[dtype, device] = _pair(self.step, self.shape, dtype, device)
        return pair

    def apply_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The updated weight as a new float32 tensor: the reference, and what DoRA's norms are taken of."""
        merged = weight.detach().to(torch.float32, copy=True)
        for step in self._steps:
            merged = _merge(step, self.shape, merged, None)
            if step.dense is not None:
                merged = step.dense(merged)
        return merged

    def merged(self, weight: torch.Tensor, factor_dtype: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
        """:meth:`apply_to` without dense steps, in ``dtype``, by the kept pair: one pass if there are only factors."""
        pair, scales = self.pair(factor_dtype, weight.device), self.step.scales
        if scales.row is None and scales.column is None and not self.step.kroneckers:
            down, up = pair
            base = weight.detach().to(up.dtype).flatten(1)
            return torch.addmm(base, up, down.flatten(1)).reshape(self.shape).to(dtype)
        return _merge(self.step, self.shape, weight.detach().to(torch.float32, copy=True), pair).to(dtype)


def _pair(step: Step, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Pair:
    up = torch.zeros(shape[0], step.rank, dtype=dtype, device=device)
    down = torch.zeros(step.rank, shape[1], torch.Size(shape[2:]).numel(), dtype=dtype, device=device)
    start = 0
    for term in step.factors:
        term.write(up.narrow(1, start, term.rank), down.narrow(0, start, term.rank))
        start += term.rank
    return down.reshape(step.rank, *shape[1:]), up


def _merge(step: Step, shape: tuple[int, ...], weight: torch.Tensor, pair: Pair | None) -> torch.Tensor:
    """One step's linear part on ``weight``, float32, changed in place."""
    if step.scales.row is not None:
        weight *= step.scales.row.to(weight.device).reshape(-1, *[1] * (weight.dim() - 1))
    if step.scales.column is not None:
        weight *= step.scales.column.to(weight.device).reshape(1, -1, *[1] * (weight.dim() - 2))
    if step.factors:
        down, up = pair if pair is not None else _pair(step, shape, torch.float32, weight.device)
        weight.view(shape[0], -1).addmm_(up.float(), down.flatten(1).float())
    for term in step.kroneckers:
        weight.narrow(0, *term.rows).narrow(1, *term.columns).add_(term.dense(weight.device))
    return weight
