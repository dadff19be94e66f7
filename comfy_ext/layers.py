"""The patched layers of one model, and which way each went: the ladder of DESIGN, decided in one place.

1. *low-rank*: a branch beside the layer, or the weight with its factors for one call, whichever is cheaper then
2. *transient*: what has no such form (rotations, full differences, model merges) makes the weight anew at each call
3. *private*: biases, norms and weights that are read without calling their layer become private tensors, in a budget
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.model_patcher
import comfy.ops
import comfy.utils
import torch

from lunashm.client.lowrank import Injection, UnsupportedLayer, Update, inject

from .adapters import update_of
from .shapes import Patch
from .units import size

READ_DIRECTLY = (
    "position_embedding.weight",
    "position_embeddings.weight",
    "token_type_embeddings.weight",
    "embed_tokens.weight",
    "lm_head.weight",
    "trainable_cond_mask.weight",
)
"""Weights that ComfyUI 0.28 reads without calling their module: nothing put around its forward would be seen."""

_CALLED = torch.nn.Linear | torch.nn.modules.conv._ConvNd | torch.nn.Embedding


@dataclass
class Rungs:
    """How many layers went which way, and what that costs: the client's report.

    ``transient_nbytes``: made anew at each call of those layers, one layer at a time, and thrown away.
    """

    low_rank: int = 0
    low_rank_nbytes: int = 0
    transient: int = 0
    transient_nbytes: int = 0
    private: int = 0
    private_nbytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        """``212 layers low-rank (12.3 MB), 4 transient, 2 private (3.1 MB)``"""
        parts = [f"{self.low_rank} layers low-rank ({size(self.low_rank_nbytes)})"]
        if self.transient:
            parts.append(f"{self.transient} transient ({size(self.transient_nbytes)} made anew at each call)")
        else:
            parts.append("0 transient")
        parts.append(f"{self.private} private ({size(self.private_nbytes)})")
        why = "".join(f"; {count} for {reason}" for reason, count in self.reasons.most_common(3))
        return ", ".join(parts) + why


class PatchedLayers:
    """What is around the layers of one model now. On the model, as its patchers share it: whoever is loaded next takes
    off what another put on."""

    def __init__(self) -> None:
        self.injections: dict[str, Injection] = {}
        self.rungs = Rungs()
        self.said_merge = False
        self.exchangeable = False  # whether the model was loaded in a way that patches alone make no difference to
        self._base: dict[str, Update | None] = {}  # of layers with a hook's update on top: what they had before

    def __contains__(self, key: str) -> bool:
        return key in self.injections

    @property
    def nbytes(self) -> int:
        """Private bytes of everything that is around a layer."""
        return sum(injection.nbytes for injection in self.injections.values())

    def update_for(self, model: torch.nn.Module, key: str, patches: Sequence[Patch], originals: Any = None) -> Update:
        """Raises UnsupportedLayer, saying why, for what only a private tensor can show."""
        path, _, name = key.rpartition(".")
        if name != "weight":
            raise UnsupportedLayer("a bias or a tensor without a layer")
        if key.endswith(READ_DIRECTLY):
            raise UnsupportedLayer("a weight that is read without calling its layer")
        weight, set_function, convert_function = comfy.model_patcher.get_key_weight(model, key)
        if set_function is not None or convert_function is not None:
            raise UnsupportedLayer("a quantised weight")
        if weight.dim() < 2 or not isinstance(comfy.utils.get_attr(model, path), _CALLED):
            raise UnsupportedLayer("a norm or another small tensor")
        return update_of(patches, weight, key, originals)

    def put(self, model: torch.nn.Module, key: str, update: Update) -> None:
        """Around the layer of ``key``, in place of what is there. Raises UnsupportedLayer, with that still there."""
        module = comfy.utils.get_attr(model, key.rpartition(".")[0])
        present = self.injections.get(key)
        if present is not None and present.module is module:
            present.replace(update)
            return
        self.take_off(key)  # it is around a layer that an object patch has put away
        self.injections[key] = inject(module, update, _plain)  # an identity, too: the patch is done, nobody shall copy

    def exchange(self, model: torch.nn.Module, updates: dict[str, Update]) -> None:
        """What is around the layers becomes ``updates`` and nothing else. Raises UnsupportedLayer, half done."""
        for key in [key for key in self.injections if key not in updates]:
            self.take_off(key)
        for key, update in updates.items():
            self.put(model, key, update)

    def put_hook(self, model: torch.nn.Module, key: str, update: Update) -> None:
        """The same for a weight hook's update, base patches included; :meth:`unhook` brings these back."""
        before = self.injections[key].update if key in self.injections else None
        base = self._base.get(key, before)  # put() forgets it where it takes something off
        self.put(model, key, update)
        self._base[key] = base

    def unhook(self, keys: set[str] | None = None) -> None:
        """Layers with a hook's update (all, or those of ``keys``) have their base patches again."""
        for key in [k for k in self._base if keys is None or k in keys]:
            base = self._base.pop(key)
            if base is not None and key in self.injections:
                self.injections[key].replace(base)
            else:
                self.take_off(key)

    def take_off(self, key: str) -> bool:
        self._base.pop(key, None)
        injection = self.injections.pop(key, None)
        if injection is not None:
            injection.remove()
        return injection is not None

    def take_off_all(self) -> None:
        self.exchangeable = False
        for key in reversed(list(self.injections)):
            self.take_off(key)

    def count(self, model: torch.nn.Module, private: Sequence[str], reasons: Counter[str]) -> Rungs:
        """The report for what is applied now; ``private``: keys of the tensors that were copied."""
        rungs = Rungs(private=len(private), private_nbytes=nbytes_of(model, private), reasons=reasons)
        for injection in self.injections.values():
            if injection.update.is_identity:
                continue
            if injection.update.is_dense:
                rungs.transient += 1
                rungs.transient_nbytes += injection.weight_nbytes
            else:
                rungs.low_rank += 1
                rungs.low_rank_nbytes += injection.nbytes
        self.rungs = rungs
        return rungs


def nbytes_of(model: torch.nn.Module, keys: Iterable[str]) -> int:
    """Of these parameters as they are now."""
    return sum(comfy.utils.get_attr(model, key).nbytes for key in keys)


def _plain(module: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Weight and bias as ComfyUI's Linear would cast them for ``x``."""
    if type(module).forward not in (comfy.ops.disable_weight_init.Linear.forward, torch.nn.Linear.forward):
        return None
    if not hasattr(module, "comfy_cast_weights"):
        return (module.weight, module.bias) if module.weight.dtype == x.dtype else None
    comfy.ops.run_every_op()
    weight, bias = comfy.ops.cast_bias_weight(module, x)
    return weight, bias
