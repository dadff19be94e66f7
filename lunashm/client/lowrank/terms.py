"""What can be added to a weight without writing the sum down: a product of two factors, a Kronecker product.

Terms refer to the tensors they are given (a LoRA file's mapping, say) and copy nothing; scalings are vectors beside
them. ``rows`` and ``columns`` place a term in a part of a fused weight, as (start, length).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

Part = tuple[int, int]
"""A stretch of rows or columns: (start, length)."""


@dataclass
class Scales:
    """Factors along the rows (out,) and columns (in,) of a weight; None is all ones."""

    row: torch.Tensor | None = None
    column: torch.Tensor | None = None

    def scale_rows(self, factor: torch.Tensor) -> None:
        self.row = factor if self.row is None else self.row * factor.to(self.row.device)

    def scale_columns(self, factor: torch.Tensor) -> None:
        self.column = factor if self.column is None else self.column * factor.to(self.column.device)

    @property
    def nbytes(self) -> int:
        return sum(scale.nbytes for scale in (self.row, self.column) if scale is not None)


@dataclass
class Factors:
    """``factor * up @ down``: up (out, r), down (r, in * kernel), of the part of the weight that they fit.

    ``owned``: computed for this update, where others refer to a file's tensors.
    """

    up: torch.Tensor
    down: torch.Tensor
    factor: float
    rows: Part
    columns: Part
    owned: bool
    scales: Scales = field(default_factory=Scales)

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def nbytes(self) -> int:
        """Private bytes, the concatenated pair that it goes into not counted."""
        return self.scales.nbytes + (self.up.nbytes + self.down.nbytes if self.owned else 0)

    def write(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Into its stretch of a layer's pair: up (out, rank), down (rank, in, kernel), both zero so far."""
        rows, columns = up.narrow(0, *self.rows), down.narrow(1, *self.columns)
        scaled = self.up.to(rows.device, torch.float32) * self.factor
        if self.scales.row is not None:
            scaled *= self.scales.row.to(rows.device).narrow(0, *self.rows)[:, None]
        rows.copy_(scaled)
        columns.copy_(self.down.to(columns.device).reshape(columns.shape))
        if self.scales.column is not None:
            columns.copy_(columns.float() * self.scales.column.to(columns.device).narrow(0, *self.columns)[:, None])


@dataclass
class Kronecker:
    """``factor * kron(first, second)``: first (o1, i1), second (o2, i2, *kernel) or, in a matrix, two factors of it."""

    first: torch.Tensor
    second: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    factor: float
    rows: Part
    columns: Part
    scales: Scales = field(default_factory=Scales)

    @property
    def shape(self) -> tuple[int, ...]:
        """(out, in, *kernel) of the part that it is."""
        last = self.second if isinstance(self.second, torch.Tensor) else self.second[1]
        second_rows = (self.second if isinstance(self.second, torch.Tensor) else self.second[0]).shape[0]
        return self.first.shape[0] * second_rows, self.first.shape[1] * last.shape[1], *last.shape[2:]

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [self.first, *([self.second] if isinstance(self.second, torch.Tensor) else self.second)]

    @property
    def nbytes(self) -> int:
        return self.scales.nbytes

    @property
    def macs(self) -> int:
        """Multiply-adds for one position: second on each of the i1 blocks, then first across them."""
        inner = self.first.shape[1]
        chain = sum(tensor.numel() for tensor in self.tensors[1:])
        return inner * chain + self.first.numel() * (self.shape[0] // self.first.shape[0])

    def dense(self, device: torch.device) -> torch.Tensor:
        """(out, in, *kernel) of its part, float32, scales included."""
        first, *rest = (tensor.to(device, torch.float32) for tensor in self.tensors)
        second = rest[0] if len(rest) == 1 else rest[0] @ rest[1]
        spread = first.reshape(*first.shape, *[1] * (second.dim() - 2)) * self.factor
        whole = torch.kron(spread, second.contiguous())  # kron() needs views of it
        trailing = [1] * (whole.dim() - 2)
        if self.scales.row is not None:
            whole *= self.scales.row.to(device).narrow(0, *self.rows).reshape(-1, 1, *trailing)
        if self.scales.column is not None:
            whole *= self.scales.column.to(device).narrow(0, *self.columns).reshape(1, -1, *trailing)
        return whole
