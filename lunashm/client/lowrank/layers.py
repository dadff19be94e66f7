"""How each kind of layer computes an update beside its own forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own customary name

from lunashm.client.lowrank.terms import Kronecker
from lunashm.client.lowrank.update import Update

Convolution = torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d


class Layer:
    """One kind of layer. Rows and columns of its weight are dimensions of its output and input."""

    scales_output = False  # whether columns are the output's features too, as in an embedding

    def __init__(self, update: Update) -> None:
        self._kroneckers = update.step.kroneckers

    def positions(self, x: torch.Tensor) -> int:
        """Tokens or output pixels that ``x`` has: how often the weight is applied."""
        raise NotImplementedError

    def scale_input(self, x: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def scale_output(
        self, x: torch.Tensor, y: torch.Tensor, row: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """``row`` is the weight's: the bias in ``y`` keeps its own size."""
        raise NotImplementedError

    def add(
        self, y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, *, in_place: bool
    ) -> torch.Tensor:
        """y + x A^T B^T + kroneckers, in y's dtype; the products in the factors' dtype."""
        raise NotImplementedError


def layer_of(module: torch.nn.Module, update: Update) -> Layer | None:
    """None where there is no branch: a dense update, or a layer whose computation is not known."""
    if update.is_dense:
        return None
    if isinstance(module, torch.nn.Linear):
        return _Linear(update)
    if isinstance(module, Convolution) and _is_simple(module):
        return _Convolution(module, update)
    if isinstance(module, torch.nn.Embedding) and not update.step.kroneckers and module.max_norm is None:
        return _Embedding(update)
    return None


def computes_plainly(module: torch.nn.Module) -> bool:
    """False where somebody gave this module a computation of its own (a circular ``_conv_forward``, say): what a branch
    repeats would be another. Asked at each call, as packs do that at any time."""
    return "_conv_forward" not in module.__dict__


def spread(vector: torch.Tensor, like: torch.Tensor, dimension: int) -> torch.Tensor:
    """``vector`` along one dimension of ``like``, to broadcast over the others."""
    shape = [1] * like.dim()
    shape[dimension] = -1
    return vector.reshape(shape)


def _scaled_output(y: torch.Tensor, row: torch.Tensor, bias: torch.Tensor | None, dimension: int) -> torch.Tensor:
    p = row.to(y.device)
    scaled = y.float() * spread(p, y, dimension)
    if bias is not None:
        rest = (1.0 - p) * bias.to(device=y.device, dtype=torch.float32)
        scaled += spread(rest, y, dimension)
    return scaled.to(y.dtype)


class _Linear(Layer):
    def positions(self, x: torch.Tensor) -> int:
        return x.numel() // x.shape[-1]

    def scale_input(self, x: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return (x * column.to(x.device)).to(x.dtype)

    def scale_output(
        self, x: torch.Tensor, y: torch.Tensor, row: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return _scaled_output(y, row, bias, -1)

    def add(
        self, y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, *, in_place: bool
    ) -> torch.Tensor:
        given, x = y, x.to(down.dtype)
        if not in_place or not y.is_contiguous() or y.dtype != down.dtype:
            y = y.to(down.dtype, copy=True, memory_format=torch.contiguous_format)
        if up.shape[1]:
            y.view(-1, y.shape[-1]).addmm_(F.linear(x, down).reshape(-1, up.shape[1]), up.t())
        for term in self._kroneckers:
            y.narrow(-1, *term.rows).add_(self._kronecker(term, x.narrow(-1, *term.columns)))
        return y.to(given.dtype)

    @staticmethod
    def _kronecker(term: Kronecker, x: torch.Tensor) -> torch.Tensor:
        """kron(first, second) x without the product: second on each of the i1 blocks of x, first across them."""
        first, *chain = (tensor.to(x.device, x.dtype) for tensor in term.tensors)
        if term.scales.column is not None:
            x = x * term.scales.column.to(x.device, x.dtype).narrow(0, *term.columns)
        blocks = x.reshape(-1, first.shape[1], x.shape[-1] // first.shape[1])
        for factor in reversed(chain):
            blocks = F.linear(blocks, factor)
        y = torch.matmul(first * term.factor, blocks).reshape(*x.shape[:-1], -1)
        return y if term.scales.row is None else y * term.scales.row.to(y.device, y.dtype).narrow(0, *term.rows)


class _Convolution(Layer):
    def __init__(self, module: Convolution, update: Update) -> None:
        super().__init__(update)
        self._convolve: Callable[..., torch.Tensor] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(module.kernel_size)]
        self._options = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        self._stride = torch.Size(module.stride).numel()
        self._ones = [1] * len(module.kernel_size)

    def positions(self, x: torch.Tensor) -> int:
        return x.numel() // x.shape[-len(self._ones) - 1] // self._stride

    def scale_input(self, x: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return (x * spread(column.to(x.device), x, -len(self._ones) - 1)).to(x.dtype)

    def scale_output(
        self, x: torch.Tensor, y: torch.Tensor, row: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return _scaled_output(y, row, bias, -len(self._ones) - 1)

    def add(
        self, y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, *, in_place: bool
    ) -> torch.Tensor:
        given, x = y, x.to(down.dtype)
        if not in_place or y.dtype != down.dtype:
            y = y.to(down.dtype, copy=True)
        if up.shape[1]:
            hidden = self._convolve(x, down, **self._options)  # (batch, rank, *size)
            y.add_(self._convolve(hidden, up.reshape(*up.shape, *self._ones)))
        channels = -len(self._ones) - 1
        for term in self._kroneckers:
            y.narrow(channels, *term.rows).add_(self._kronecker(term, x.narrow(channels, *term.columns)))
        return y.to(given.dtype)

    def _kronecker(self, term: Kronecker, x: torch.Tensor) -> torch.Tensor:
        """As for a linear layer, with the blocks of channels in the batch."""
        first, second = (tensor.to(x.device, x.dtype) for tensor in term.tensors)
        channels = -len(self._ones) - 1
        if term.scales.column is not None:
            x = x * spread(term.scales.column.to(x.device, x.dtype).narrow(0, *term.columns), x, channels)
        outer = x.shape[: x.dim() + channels]
        size = x.shape[channels + 1 :]
        blocks = x.reshape(-1, x.shape[channels] // first.shape[1], *size)
        blocks = self._convolve(blocks, second, **self._options)
        blocks = blocks.reshape(-1, first.shape[1], *blocks.shape[1:])
        y = torch.einsum("oi,bi...->bo...", first * term.factor, blocks).flatten(1, 2)
        y = y.reshape(*outer, *y.shape[1:])
        return y if term.scales.row is None else y * spread(term.scales.row.to(y).narrow(0, *term.rows), y, channels)


class _Embedding(Layer):
    """Rows of the weight are tokens: (B A)[ids] = B[ids] A."""

    scales_output = True

    def positions(self, x: torch.Tensor) -> int:
        return x.numel()

    def scale_input(self, x: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        return x  # its columns are the output's

    def scale_output(
        self, x: torch.Tensor, y: torch.Tensor, row: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        return (y.float() * row.to(y.device)[x].unsqueeze(-1)).to(y.dtype)

    def add(
        self, y: torch.Tensor, x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, *, in_place: bool
    ) -> torch.Tensor:
        return (y + F.embedding(x, up) @ down).to(y.dtype) if up.shape[1] else y


def _is_simple(module: Convolution) -> bool:
    """Whether a low-rank branch can repeat what it does: not grouped, padded with zeros by numbers."""
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
