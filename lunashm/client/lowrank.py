"""Low-rank updates of layers whose weights nobody may write. Knows torch modules, neither files nor ComfyUI.

An :class:`Update` is everything a stack of adapters does to one weight, in the form

    W -> p * W * q + B A        p: (out, 1) row scale, q: (1, in) column scale, B: (out, r), A: (r, in * kernel)

which LoRA, LoCon, LoHa, GLoRA, scalings of the base and DoRA (along either axis) never leave, in any order. All
terms are concatenated, so a layer costs two extra products however deep the stack; the weight is only read.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own customary name

Convolution = torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d


class UnsupportedLayer(Exception):
    """This layer cannot take a low-rank update from outside; the message says why."""


class Update:
    """What a stack of adapters does to a weight of ``shape`` (out, in, *kernel); an identity when new.

    Terms are added in stack order: each acts on the result of those before it. Factors are kept in float32.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise UnsupportedLayer(f"a weight of shape {list(shape)} has no rows and columns")
        self.shape = shape
        self.row: torch.Tensor | None = None  # (out,)
        self.column: torch.Tensor | None = None  # (in,)
        self._ups: list[torch.Tensor] = []
        self._downs: list[torch.Tensor] = []

    @property
    def rank(self) -> int:
        return sum(up.shape[1] for up in self._ups)

    @property
    def up(self) -> torch.Tensor:
        """B: (out, rank), float32."""
        self._concatenate()
        return self._ups[0] if self._ups else torch.zeros(self.shape[0], 0)

    @property
    def down(self) -> torch.Tensor:
        """A: (rank, in, *kernel), float32."""
        self._concatenate()
        return self._downs[0] if self._downs else torch.zeros(0, *self.shape[1:])

    def _concatenate(self) -> None:
        """All terms as one pair, in place of the single ones."""
        if len(self._ups) > 1:
            self._ups = [torch.cat(self._ups, dim=1)]
            self._downs = [torch.cat(self._downs)]

    @property
    def nbytes(self) -> int:
        tensors = [*self._ups, *self._downs, *(s for s in (self.row, self.column) if s is not None)]
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def is_identity(self) -> bool:
        return not self._ups and self.row is None and self.column is None

    def add(self, up: torch.Tensor, down: torch.Tensor, factor: float = 1.0) -> None:
        """W += factor * up @ down, with ``up`` (out, r) and ``down`` (r, in * kernel or in, *kernel).

        Raises UnsupportedLayer naming both shapes where they do not fit.
        """
        columns = torch.Size(self.shape[1:]).numel()
        if up.dim() != 2 or up.shape[0] != self.shape[0] or down.shape[0] != up.shape[1] or down[:1].numel() != columns:
            shapes = f"{list(up.shape)} x {list(down.shape)}"
            raise UnsupportedLayer(f"factors {shapes} do not fit a weight of {list(self.shape)}")
        if factor == 0.0 or up.shape[1] == 0:
            return
        self._ups.append(up.detach().to(torch.float32) * factor)
        self._downs.append(down.detach().to(torch.float32).reshape(up.shape[1], *self.shape[1:]))

    def scale_rows(self, scale: torch.Tensor | float) -> None:
        """W = scale[:, None] * W, terms so far included; ``scale`` (out,) or a number."""
        factor = torch.as_tensor(scale, dtype=torch.float32).expand(self.shape[0])
        if bool((factor == 1.0).all()):
            return
        self.row = factor.clone() if self.row is None else self.row * factor
        self._ups = [up * factor[:, None] for up in self._ups]

    def scale_columns(self, scale: torch.Tensor) -> None:
        """W = W * scale[None, :], terms so far included; ``scale`` (in,)."""
        factor = scale.to(torch.float32).expand(self.shape[1])
        self.column = factor.clone() if self.column is None else self.column * factor
        spread = factor.reshape(1, -1, *[1] * (len(self.shape) - 2))
        self._downs = [down * spread for down in self._downs]

    def apply_to(self, weight: torch.Tensor) -> torch.Tensor:
        """The updated weight as a new float32 tensor: the reference, and what DoRA's norms are taken of."""
        merged = weight.detach().to(torch.float32, copy=True)
        if self.row is not None:
            merged *= self.row.reshape(-1, *[1] * (len(self.shape) - 1))
        if self.column is not None:
            merged *= self.column.reshape(1, -1, *[1] * (len(self.shape) - 2))
        if self._ups:
            merged += (self.up @ self.down.flatten(1)).reshape(self.shape)
        return merged


class Injection:
    """One module's forward with an update around it. :meth:`remove` restores exactly what was there."""

    def __init__(self, module: torch.nn.Module, update: Update) -> None:
        """Raises UnsupportedLayer for a module whose computation is not known."""
        self._module = module
        self._update = update
        self._branch = _branch_for(module, update)
        self._cast: dict[torch.dtype, tuple[torch.Tensor, torch.Tensor]] = {}
        self._own_forward = module.__dict__.get("forward")
        self._stock: Callable[..., torch.Tensor] = module.forward
        if not update.is_identity:
            module.forward = self._forward

    @property
    def nbytes(self) -> int:
        """Bytes of factors, and of their casts as far as they were needed."""
        own = {id(t): t.nbytes for pair in self._cast.values() for t in pair}  # float32 needs no cast: counted once
        own.pop(id(self._update.up), None)
        own.pop(id(self._update.down), None)
        return self._update.nbytes + sum(own.values())

    def remove(self) -> None:
        """Idempotent. Injections come off in the reverse order they were put on."""
        if self._module.__dict__.get("forward") == self._forward:
            if self._own_forward is None:
                del self._module.forward
            else:
                self._module.forward = self._own_forward

    def _forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        update = self._update
        y = self._stock(_scale(x, update.column, self._branch.channels_in), *args, **kwargs)
        if update.row is not None:
            bias = getattr(self._module, "bias", None)
            y = _scale(y, update.row, self._branch.channels_out)
            if bias is not None:  # the row scale is the weight's: take it off the bias again
                rest = (1.0 - update.row.to(y.device)) * bias.to(device=y.device, dtype=torch.float32)
                y = y + _spread(rest.to(y.dtype), y, self._branch.channels_out)
        if update.rank == 0:
            return y
        return self._branch.add(self._module, x, y, *self._factors(y))

    def _factors(self, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B in the layer's compute dtype and device, cast once. A: (r, in, *kernel), B: (out, r)."""
        cast = self._cast.get(y.dtype)
        if cast is None or cast[0].device != y.device:
            with torch.inference_mode(False):
                cast = (self._update.down.to(y.device, y.dtype), self._update.up.to(y.device, y.dtype))
            self._cast[y.dtype] = cast
        return cast


def inject(module: torch.nn.Module, update: Update) -> Injection:
    """Put ``update`` around ``module``'s forward; an identity leaves the module untouched.

    Raises UnsupportedLayer, with the module as it was.
    """
    return Injection(module, update)


class _Branch:
    """How one kind of layer computes x A^T B^T. ``channels_*``: the dimension that rows and columns belong to."""

    channels_in = -1
    channels_out = -1

    def add(
        self, module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, down: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:
        raise NotImplementedError


class _Linear(_Branch):
    def add(
        self, module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, down: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:
        hidden = F.linear(x.to(y.dtype), down)  # (..., rank)
        if y.is_contiguous():
            y.view(-1, y.shape[-1]).addmm_(hidden.reshape(-1, hidden.shape[-1]), up.t())
            return y
        return y + F.linear(hidden, up)


class _Convolution(_Branch):
    channels_in = 1
    channels_out = 1

    def __init__(self, module: Convolution) -> None:
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise UnsupportedLayer(f"{module} is grouped, or padded in a way that a low-rank branch cannot repeat")
        self._convolve: Callable[..., torch.Tensor] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(module.kernel_size)]
        self._options = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation}
        self._ones = [1] * len(module.kernel_size)

    def add(
        self, module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, down: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:
        hidden = self._convolve(x.to(y.dtype), down, **self._options)  # (batch, rank, *size)
        return y.add_(self._convolve(hidden, up.reshape(*up.shape, *self._ones)))


class _Embedding(_Branch):
    """Rows of the weight are tokens: (B A)[ids] = B[ids] A."""

    def add(
        self, module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, down: torch.Tensor, up: torch.Tensor
    ) -> torch.Tensor:
        return y + F.embedding(x, up) @ down


def _branch_for(module: torch.nn.Module, update: Update) -> _Branch:
    if isinstance(module, torch.nn.Linear):
        return _Linear()
    if isinstance(module, Convolution):
        return _Convolution(module)
    if isinstance(module, torch.nn.Embedding):
        if update.row is not None or update.column is not None:
            raise UnsupportedLayer("scales of an Embedding (DoRA, strength_model) are not done by a low-rank branch")
        return _Embedding()
    raise UnsupportedLayer(f"{type(module).__name__} is neither Linear, Conv nor Embedding")


def _scale(tensor: torch.Tensor, scale: torch.Tensor | None, dimension: int) -> torch.Tensor:
    return tensor if scale is None else tensor * _spread(scale.to(tensor.device, tensor.dtype), tensor, dimension)


def _spread(vector: torch.Tensor, like: torch.Tensor, dimension: int) -> torch.Tensor:
    """``vector`` along one dimension of ``like``, to broadcast over the others."""
    shape = [1] * like.dim()
    shape[dimension] = -1
    return vector.reshape(shape)
