"""One module with an update around it: for each call, the cheaper of a branch beside the layer and an updated weight.

The branch costs two thin products per position (token or pixel), ``N r (in + out)``. The weight ``W + B A`` made for
one call costs ``r in out`` once and is thrown away afterwards: with many positions and small layers that is much less.
Both read the shared weight and write only private memory.

Rounding: in float32 both are exact to a few units in the last place. In half precision an updated weight is rounded as
a merged one is; a branch is used only beside plain linear layers, whose product takes it as its addend, so that the
sum is rounded once (and on CPU the branch itself is made in float32): at least as close as merged weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lunashm.client.lowrank.layers import Layer, computes_plainly, layer_of, spread
from lunashm.client.lowrank.update import UnsupportedLayer, Update

Plain = Callable[[torch.nn.Module, torch.Tensor], tuple[torch.Tensor, torch.Tensor | None] | None]
"""Weight and bias in the dtype and on the device of the given input, where the module does nothing but
``linear(input, weight, bias)``; else None."""

PASS_MACS = {"cpu": 64}
"""What writing one element of a fresh weight costs, in multiply-adds; bench.lora_rule shows what the choice costs."""

_PASS_MACS_ELSEWHERE = 256

_HALF = (torch.float16, torch.bfloat16)


def plain_linear(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The :data:`Plain` of torch's own layers."""
    if type(module) is not torch.nn.Linear or module.weight.dtype != x.dtype or module.weight.device != x.device:
        return None
    return module.weight, module.bias


class Injection:
    """One module's forward with an update around it. :meth:`remove` restores exactly what was there."""

    def __init__(self, module: torch.nn.Module, update: Update, plain: Plain = plain_linear) -> None:
        self._module = module
        self._plain = plain
        self._own_forward = module.__dict__.get("forward")
        self._stock: Callable[..., torch.Tensor] = module.forward
        self._installed = False
        self.replace(update)

    def replace(self, update: Update) -> None:
        """Another update for the same weight, from the next call on."""
        self._update = update
        self._layer = layer_of(self._module, update)
        self._idle = update.is_identity
        if not self._idle and not self._installed:
            self._module.forward = self._forward
            self._installed = True

    @property
    def module(self) -> torch.nn.Module:
        return self._module

    @property
    def update(self) -> Update:
        return self._update

    @property
    def nbytes(self) -> int:
        """Private bytes: factors in the dtypes they were needed in; before the first call, in the weight's dtype."""
        update = self._update
        made = update.has_pairs or update.is_dense
        return update.nbytes + (0 if made else update.pair_numel * self._weight.element_size())

    @property
    def weight_nbytes(self) -> int:
        """Of the layer's own weight: what one updated weight takes for the length of a call."""
        return self._weight.nbytes

    @property
    def _weight(self) -> torch.Tensor:
        weight = self._module._parameters["weight"]
        assert weight is not None
        return weight

    def remove(self) -> None:
        """Idempotent. Where another wrapper was put on top since, this one stays in the chain and does nothing."""
        self.replace(Update(self._update.shape))
        if self._module.__dict__.get("forward") == self._forward:
            self._installed = False
            if self._own_forward is None:
                del self._module.forward
            else:
                self._module.forward = self._own_forward

    def _forward(self, *args: object, **kwargs: object) -> torch.Tensor:
        if self._idle:
            return self._stock(*args, **kwargs)
        x, args = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        assert isinstance(x, torch.Tensor)
        layer = self._layer
        if layer is None or not computes_plainly(self._module) or self.takes_fresh_weight(x):
            return self._merged(x, *args, **kwargs)
        if x.dtype in _HALF:
            plain = None
            if self._own_forward is None and not self._update.step.scales.nbytes and not args and not kwargs:
                plain = self._plain(self._module, x)
            return self._merged(x, *args, **kwargs) if plain is None else self._as_addend(layer, x, *plain)
        return self._beside(layer, x, *args, **kwargs)

    def takes_fresh_weight(self, x: torch.Tensor) -> bool:
        """Whether the weight is made anew for this input: multiply-adds compared, a pass over memory as PASS_MACS."""
        if self._layer is None:
            return True
        update, step = self._update, self._update.step
        rows, columns = update.shape[0], update.columns
        per_position = step.rank * (rows + columns) + sum(term.macs for term in step.kroneckers)
        scaled = step.scales.row is not None or step.scales.column is not None
        passes = 1 + 2 * scaled + 3 * len(step.kroneckers)
        a_pass = PASS_MACS.get(x.device.type, _PASS_MACS_ELSEWHERE)
        return rows * columns * (step.rank + passes * a_pass) < self._layer.positions(x) * per_position

    def _merged(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The layer's own forward with the updated weight in the shared one's place, for this call."""
        parameters: dict[str, torch.Tensor | None] = self._module._parameters  # type: ignore[assignment]
        weight = self._weight
        shown = weight.to(x.device)  # offloaded to RAM: updated where the input is
        dtype = x.dtype if x.is_floating_point() else weight.dtype
        if self._update.is_dense:
            updated = self._update.apply_to(shown).to(dtype)
        else:
            updated = self._update.merged(shown, _factor_dtype(x.device, dtype), dtype)
        parameters["weight"] = torch.nn.Parameter(updated, requires_grad=False)
        try:
            return self._stock(x, *args, **kwargs)
        finally:
            parameters["weight"] = weight

    def _beside(self, layer: Layer, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        """The layer's output, corrected: p (y - b) + b + branch(x)."""
        scales = self._update.step.scales
        shared = x if scales.column is None else layer.scale_input(x, scales.column)
        y = self._stock(shared, *args, **kwargs)
        if scales.column is not None and layer.scales_output:
            y = y * spread(scales.column.to(y.device, y.dtype), y, -1)
        if scales.row is not None:
            y = layer.scale_output(x, y, scales.row, getattr(self._module, "bias", None))
        down, up = self._update.pair(_factor_dtype(y.device, y.dtype), y.device)
        return layer.add(y, x, down, up, in_place=self._own_forward is None)

    def _as_addend(
        self, layer: Layer, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The same for a plain linear layer in half precision: the branch first, so that the sum is rounded once."""
        down, up = self._update.pair(_factor_dtype(x.device, x.dtype), x.device)
        addend = torch.zeros(*x.shape[:-1], self._update.shape[0], dtype=down.dtype, device=x.device)
        if bias is not None:
            addend += bias
        flat = layer.add(addend, x, down, up, in_place=True).to(x.dtype).view(-1, addend.shape[-1])
        return flat.addmm_(x.reshape(-1, x.shape[-1]), weight.t()).view(addend.shape)


def inject(module: torch.nn.Module, update: Update, plain: Plain = plain_linear) -> Injection:
    """Put ``update`` around ``module``'s forward; an identity leaves the module untouched.

    ``plain``: how to get at weights that the module casts for its own use. Raises UnsupportedLayer for a module
    without a weight of the update's shape, with the module as it was.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or tuple(weight.shape) != update.shape:
        shape = list(weight.shape) if isinstance(weight, torch.Tensor) else "none"
        raise UnsupportedLayer(f"{type(module).__name__} has no weight of {list(update.shape)}, but {shape}")
    return Injection(module, update, plain)


def _factor_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """On CPU float32 products cost little more than half precision's, and round less."""
    return torch.float32 if device.type == "cpu" else dtype
