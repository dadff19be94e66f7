"""LoRAs on a model whose weights nobody may write. Owns what is applied to which layer, and takes it off again.

All LoRAs of a layer are one update and one injection, rebuilt whenever one comes or goes; each acts on what those
before it made of the weight. A layer that no LoRA is left on is as it was: no attribute, the same output to the bit.
Files are read once per process (:mod:`lunashm.client.factors`).
"""

from __future__ import annotations

import logging
import math
import os
import threading
import weakref
from collections.abc import Sequence
from types import TracebackType

import torch

from lunashm.client import lora_file
from lunashm.client.factors import FactorCache
from lunashm.client.lora_file import LoraFile, listed
from lunashm.client.lora_names import Layer, Matches, match
from lunashm.client.lora_scale import Scales
from lunashm.client.lora_term import Term
from lunashm.client.lowrank import Injection, UnsupportedLayer, Update, inject
from lunashm.errors import LoraError, LoraMismatch, ModelNotFound, UnsupportedLora

log = logging.getLogger(__name__)

CACHE_NBYTES = 256 << 20
"""How much of the factors that were read is kept, as stored, for the next time."""

_ATTRIBUTE = "_lunashm_loras"


class _Stack:
    """What is applied to one layer, and the injection that does it. Kept on the layer, so that it dies with it."""

    def __init__(self, layer: torch.nn.Module, terms: tuple[Term, ...], update: Update) -> None:
        """Raises UnsupportedLayer, with the layer as it was."""
        self.terms = terms
        self.update = update
        self._layer = layer
        self._injection: Injection = inject(layer, update)
        self._forward = layer.__dict__.get("forward")
        setattr(layer, _ATTRIBUTE, self)

    @staticmethod
    def on(layer: torch.nn.Module) -> _Stack | None:
        stack = layer.__dict__.get(_ATTRIBUTE)
        return stack if isinstance(stack, _Stack) else None

    @property
    def outermost(self) -> bool:
        """Whether nobody has wrapped the layer since; what was put on later has to come off first."""
        return self._layer.__dict__.get("forward") == self._forward

    @property
    def nbytes(self) -> int:
        return self._injection.nbytes

    def take_off(self) -> None:
        self._injection.remove()
        delattr(self._layer, _ATTRIBUTE)


class AppliedLora:
    """A LoRA that is applied to a model until :meth:`remove`, or the end of a ``with`` block.

    ``layers`` are the names of the layers it changes, ``unmatched`` what the file has for layers that are not there.
    Holds the model weakly. Not to be removed while another thread runs the model.
    """

    def __init__(
        self, path: str, strength: float, matches: Matches, terms: Sequence[Term], unknown: Sequence[str]
    ) -> None:
        self.path = path
        self.strength = strength
        self.layers = tuple(layer.name for layer in matches.layers.values())
        self.unmatched = (*matches.unmatched, *unknown)
        layers = (layer.module for layer in matches.layers.values())
        self._places = [(weakref.ref(layer), term) for layer, term in zip(layers, terms, strict=True)]

    def __enter__(self) -> AppliedLora:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def applied(self) -> bool:
        return bool(self._places)

    def remove(self) -> None:
        """Idempotent; other LoRAs on the same layers stay, whatever the order they came in.

        Raises LoraError, with everything still applied, if something that is no LoRA wrapped a layer since.
        """
        with _lock:
            changes = []
            for reference, term in self._places:
                layer = reference()
                stack = None if layer is None else _Stack.on(layer)
                if layer is not None and stack is not None:
                    changes.append((layer, tuple(other for other in stack.terms if other is not term)))
            _change(changes)
            self._places = []


def apply_lora(
    models: Sequence[torch.nn.Module], path: str | os.PathLike[str], strength: float = 1.0, prefix: str = ""
) -> AppliedLora:
    """Apply the LoRA at ``path`` to whichever of ``models`` have its layers, all of it or nothing.

    Weights are only read; what a LoRA needs of its own is its factors in float32, on the weights' device when used.
    ``prefix`` limits it to one part of the file (see :func:`lunashm.client.lora_names.match`). Names that mean no
    layer are one warning. Not to be called while another thread runs a model.

    Raises ModelNotFound, UnsupportedFormat, SourceChanged, InvalidLora, UnsupportedLora (a kind or a layer without a
    low-rank form), LoraMismatch (no layer found, one name for two, shapes that do not fit), ValueError for a strength
    that is no number. After any of them the models are as they were.
    """
    named = os.fspath(path)
    if not math.isfinite(strength):
        raise ValueError(f"a LoRA of strength {strength} cannot be applied")
    file = _read(named)
    matches = _matched(file, named, models, prefix)
    scales = Scales.of(file, named)
    terms = [
        Term(named, file.layers[name], scales.of_layer(name, file.layers[name]), strength) for name in matches.layers
    ]
    with _lock:
        layers = [layer.module for layer in matches.layers.values()]
        stacks = map(_Stack.on, layers)
        _change([(m, ((*s.terms, t) if s else (t,))) for m, s, t in zip(layers, stacks, terms, strict=True)])
        nbytes = sum(stack.nbytes for stack in map(_Stack.on, layers) if stack is not None)
    applied = AppliedLora(named, strength, matches, terms, file.unknown)
    if applied.unmatched:
        log.warning(
            "%s: %d of its names mean no layer of this model: %s",
            named,
            len(applied.unmatched),
            listed(applied.unmatched),
        )
    log.info("applied %s at strength %g: %d layers, %.1f MB of factors", named, strength, len(terms), nbytes / 1e6)
    return applied


def _read(path: str) -> LoraFile:
    try:
        return _cache.get(path)
    except OSError as exc:
        raise ModelNotFound(f"no LoRA at {path}: {exc.strerror or exc}") from exc


def _matched(file: LoraFile, path: str, models: Sequence[torch.nn.Module], prefix: str) -> Matches:
    """Raises LoraMismatch where no layer is found at all."""
    try:
        matches = match(file.layers, models, prefix)
    except LoraMismatch as exc:
        raise LoraMismatch(f"{path}: {exc.message}") from None
    if not matches.layers:
        kinds = " and ".join(type(model).__name__ for model in models)
        part = f" below {prefix}" if prefix else ""
        raise LoraMismatch(
            f"{path} is for another model: none of its {len(file.layers)} layers{part} is in {kinds}: "
            f"{listed(file.layers)}"
        )
    return matches


def _change(changes: Sequence[tuple[torch.nn.Module, tuple[Term, ...]]]) -> None:
    """Put these terms, and no others, on these layers. All or nothing: raises with every layer as it was."""
    for layer, _ in changes:
        stack = _Stack.on(layer)
        if stack is not None and not stack.outermost:
            raise LoraError(
                f"a {type(layer).__name__} was wrapped by something else since a LoRA was applied; undo that first"
            )
    with torch.inference_mode(False), torch.no_grad():
        updates = [_update(layer, terms) for layer, terms in changes]
        done: list[tuple[torch.nn.Module, _Stack | None]] = []
        try:
            for (layer, terms), update in zip(changes, updates, strict=True):
                done.append((layer, _Stack.on(layer)))
                _replace(layer, terms, update)
        except BaseException as exc:
            for layer, before in reversed(done):
                _replace(layer, before.terms if before else (), before.update if before else None)
            if isinstance(exc, UnsupportedLayer):
                raise _unsupported(terms, exc) from exc
            raise


def _replace(layer: torch.nn.Module, terms: tuple[Term, ...], update: Update | None) -> None:
    stack = _Stack.on(layer)
    if stack is not None:
        stack.take_off()
    if terms and update is not None:
        _Stack(layer, terms, update)


def _update(layer: torch.nn.Module, terms: tuple[Term, ...]) -> Update | None:
    """Raises LoraMismatch, UnsupportedLora."""
    if not terms:
        return None
    weight = Layer("", layer).weight
    try:
        update = Update(tuple(weight.shape))
        for term in terms:
            if term.factors.magnitude is not None and isinstance(layer, torch.nn.Embedding):
                raise UnsupportedLayer("DoRA of an embedding: its magnitudes are written in more than one way")
            term.add_to(update, weight)
    except UnsupportedLayer as exc:
        raise _unsupported(terms, exc) from exc
    return update


def _unsupported(terms: tuple[Term, ...], exc: UnsupportedLayer) -> UnsupportedLora:
    """The newest term is the one that a change is about."""
    return UnsupportedLora(f"{terms[-1].path}: {terms[-1].factors.key} cannot be applied: {exc}")


_lock = threading.RLock()
_cache: FactorCache[LoraFile]


def _reset() -> None:
    """At the start, and after a fork, which may happen while another thread holds a lock or reads a file."""
    global _lock, _cache
    _lock = threading.RLock()
    _cache = FactorCache(lora_file.read, lambda file: file.nbytes, CACHE_NBYTES)


_reset()
os.register_at_fork(after_in_child=_reset)
