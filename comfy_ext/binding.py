"""The host's bytes in a module's parameters: put there once, and again when a new host comes up.

Parameters are shared, buffers are private clones (some layers write them). Nothing is left that still points into
the loader's own mapping of the file.
"""

from __future__ import annotations

import copy
import logging
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lunashm.client import Attachment, Session
from lunashm.errors import ForkedProcess, InvalidCheckpoint, LunashmError, ModelNotReady, SourceChanged
from lunashm.manifest import DtypeRule
from lunashm.views import NAMES

from .rules import rules_for
from .trace import FileTensors, Origin, Slot, Trace

if TYPE_CHECKING:
    from .layers import PatchedLayers  # needs ComfyUI

log = logging.getLogger("lunashm.comfy")

ATTRIBUTE = "lunashm"
"""Where a root module has its binding, so that all its patchers see it."""

_RETRY_S = 1.0


@dataclass(frozen=True)
class Place:
    """A parameter and the stretch of a shared tensor it shows: ``start`` in elements, row-major.

    The owner is held weakly: a place is kept by the model it belongs to.
    """

    owner: weakref.ref[torch.nn.Module]
    name: str
    tensor: str
    start: int
    shape: torch.Size

    def bind(self, shared: dict[str, torch.Tensor]) -> None:
        owner = self.owner()
        if owner is not None:
            view = shared[self.tensor].view(-1)[self.start : self.start + self.shape.numel()].view(self.shape)
            owner._parameters[self.name] = torch.nn.Parameter(view, requires_grad=False)

    @property
    def device(self) -> torch.device | None:
        """Where the parameter is now; None if it, or its owner, is gone."""
        owner = self.owner()
        tensor = None if owner is None else owner._parameters.get(self.name)
        return None if tensor is None else tensor.device

    @property
    def key(self) -> tuple[int, str]:
        """Identifies the parameter while its owner lives."""
        return id(self.owner()), self.name


class SharedFile:
    """One file as one model shows it: an attachment of its own, so that a model can be renewed by itself."""

    def __init__(self, name: str, attachment: Attachment, session: Session, places: list[Place]) -> None:
        """``name``: the file as ComfyUI calls it; the host may know its bytes by another."""
        self.name = name
        self.attachment = attachment
        self.places = places
        self._session = session
        self._next_try = 0.0
        self._told = ""
        self._lender = f"the host at {session.endpoint.url}"
        with _live_lock:
            _live.add(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all places, each counted once."""
        shared = self.attachment.state_dict()
        return sum(place.shape.numel() * shared[place.tensor].element_size() for place in self.places)

    def bind(self, places: Iterable[Place] | None = None) -> None:
        """Point these places, or all, at the host's bytes."""
        with torch.inference_mode(False):
            shared = self.attachment.state_dict()
            for place in self.places if places is None else places:
                place.bind(shared)

    @property
    def path(self) -> str:
        return self.attachment.manifest.source.path

    @property
    def lender(self) -> str:
        """``the host at ipc:///... (posix, cpu)``, also after that host is gone."""
        host = self._session.host
        if host is not None:
            self._lender = f"the host at {host.endpoint} ({host.rung}, {host.device_name})"
        return self._lender

    def stale(self) -> bool:
        """Whether the host that lent these bytes is gone and another is there. Cheap enough for every prompt."""
        try:
            if self.attachment.attached or time.monotonic() < self._next_try:
                return False
            self._next_try = time.monotonic() + _RETRY_S
            return self._session.host is not None or self._session.host_is_back()
        except ForkedProcess:
            return False  # a child keeps drawing with what it inherited

    def renewed(self) -> Attachment | None:
        """The same bytes from the host that is there now; None, said once, where that cannot be (yet).

        Never waits for the host to load: what is mapped is valid, and the next prompt asks again.
        """
        old = self.attachment
        try:
            return old.reattached(0.0)
        except ModelNotReady:
            reason = "the host is loading it; asking again at the next prompt"
        except LunashmError as exc:
            reason = exc.message
        if reason != self._told:
            self._told = reason
            log.warning("[lunashm] %s stays on the old copy for now: %s", self.name, reason)
        return None

    def switch(self, fresh: Attachment) -> None:
        """Point every place at ``fresh`` and let go of the old mapping. The model must not be patched."""
        old, self.attachment = self.attachment, fresh
        self.bind()
        old.close()
        log.info("[lunashm] re-attached %s (generation %d)", self.name, fresh.manifest.generation)


_live: weakref.WeakSet[SharedFile] = weakref.WeakSet()
_live_lock = threading.Lock()


def shows_generation(generation: int) -> bool:
    """Whether some model of this process holds a lease of that generation of the present host."""
    return any(f.attachment.attached and f.attachment.manifest.generation == generation for f in _all())


def any_lost() -> bool:
    """Whether some model of this process shows memory that went with its host."""
    return any(file.attachment.lost for file in _all())


def shown_here() -> list[tuple[str, int, str]]:
    """Of each file that models of this process show: its name, the bytes of it that they use, who lends them."""
    found: dict[tuple[str, str], dict[tuple[str, int], int]] = {}
    for file in _all():
        shared = file.attachment.state_dict()
        stretches = found.setdefault((file.name, file.lender), {})
        for place in file.places:
            stretches[place.tensor, place.start] = place.shape.numel() * shared[place.tensor].element_size()
    return [(name, sum(stretches.values()), lender) for (name, lender), stretches in sorted(found.items())]


def _all() -> list[SharedFile]:
    with _live_lock:
        return list(_live)


def binding_of(model: torch.nn.Module | None) -> Binding | None:
    """The binding of a root module, or None where nothing ever was shared."""
    return getattr(model, ATTRIBUTE, None)


class Binding:
    """What one model (a root module) shares, and where: ``home`` is the device that the host's bytes are on."""

    def __init__(
        self, files: list[SharedFile], private_nbytes: int, layers: PatchedLayers, home: torch.device
    ) -> None:
        self.files = files
        self.private_nbytes = private_nbytes
        self.layers = layers
        self.home = home
        self.guarded = False

    @property
    def fail_stop(self) -> bool:
        """Whether some of its weights die with their host."""
        return any(file.attachment.fail_stop for file in self.files)

    def check(self) -> None:
        """Raises HostLost where weights went with their host."""
        for file in self.files:
            file.attachment.check()

    def __deepcopy__(self, memo: dict[int, object]) -> Binding:
        """A deep copy of the module has private parameters: nothing is bound there, but what is around its layers was
        copied with them and must come off as ever."""
        private_nbytes = self.shared_nbytes + self.private_nbytes
        return Binding([], private_nbytes, copy.deepcopy(self.layers, memo), self.home)

    @cached_property
    def shared_nbytes(self) -> int:
        return sum(file.nbytes for file in self.files)

    @cached_property
    def places(self) -> frozenset[tuple[int, str]]:
        """:attr:`Place.key` of every shared parameter."""
        return frozenset(place.key for file in self.files for place in file.places)

    def bind_home(self, module: torch.nn.Module | None = None) -> None:
        """Have parameters that are somewhere else (of ``module`` alone, or all) show the host's bytes again."""
        for file in self.files:
            away = [place for place in file.places if place.device not in (None, self.home)]
            file.bind([place for place in away if module is None or place.owner() is module])

    def move_private(self, model: torch.nn.Module, source: torch.device, target: torch.device) -> None:
        """What of ``model`` is on ``source`` and not shared goes to ``target``."""
        with torch.inference_mode(False):
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and parameter.device == source and (id(module), name) not in self.places:
                        moved = parameter.detach().to(target)
                        module._parameters[name] = torch.nn.Parameter(moved, requires_grad=False)
                for name, buffer in module._buffers.items():
                    if buffer is not None and buffer.device == source:
                        module._buffers[name] = buffer.to(target)

    def renewals(self, reopened: Callable[[SharedFile], Attachment]) -> list[tuple[SharedFile, Attachment]]:
        """New attachments for the files whose host is gone, where another host is there.

        ``reopened`` gets one for a file whose memory went with its host, or raises.
        """
        fresh: list[tuple[SharedFile, Attachment | None]] = []
        for file in self.files:
            if file.attachment.lost:
                fresh.append((file, reopened(file)))
            elif file.stale():
                fresh.append((file, file.renewed()))
        return [(file, attachment) for file, attachment in fresh if attachment is not None]


def needed_rules(file: FileTensors, slots: Iterable[Slot], trace: Trace) -> tuple[DtypeRule, ...] | None:
    """The dtype rules to ask the host for, so that each parameter gets what stock would have made.

    None where no parameter shows the file: there is nothing to share.
    """
    wanted: dict[str, str] = {}
    for slot in slots:
        origin = shareable(slot, trace)
        if origin is not None and origin.file is file:
            wanted.setdefault(origin.name, NAMES[slot.dtype])
    if not wanted:
        return None
    return rules_for({name: NAMES[tensor.dtype] for name, tensor in file.tensors.items()}, wanted)


def shareable(slot: Slot, trace: Trace) -> Origin | None:
    """Which stretch of a file a parameter is, dtype apart; None if it was built or changed by the loader.

    A tensor that was replaced after the load (0.8 converts the whole VAE afterwards) still counts if it is exactly
    the file's in another dtype.
    """
    tensor = slot.tensor
    if tensor is None or slot.is_buffer or not tensor.is_contiguous() or slot.dtype not in NAMES:
        return None
    origin = trace.locate(tensor)
    if origin is None and slot.origin is not None and tensor.dtype == slot.dtype:
        before = slot.origin.stretch(tensor.shape).to(tensor.dtype)
        origin = slot.origin if torch.equal(before, tensor) else None
    return origin if origin is not None and origin.file.untouched(origin.name) else None


def bind(
    file: FileTensors, slots: Iterable[Slot], trace: Trace, attachment: Attachment, session: Session
) -> SharedFile:
    """Point those of ``slots`` that came from ``file`` at the host's bytes.

    Raises SourceChanged if host and loader read different files, InvalidCheckpoint if a tensor is missing or differs.
    """
    source, local = attachment.manifest.source, file.identity
    if (source.size, source.mtime_ns) != (local.size, local.mtime_ns):
        raise SourceChanged(f"{local.path} changed while it was being attached; queue the prompt again")
    shared = attachment.state_dict()
    places = []
    for slot in slots:
        origin, tensor = shareable(slot, trace), slot.tensor
        if origin is None or origin.file is not file or tensor is None:
            continue
        theirs = shared.get(origin.name)
        if theirs is None or theirs.shape != file.tensors[origin.name].shape:
            raise InvalidCheckpoint(f"host's copy of {local.path} lacks {origin.name!r}; unload it and load it again")
        if theirs.dtype == slot.dtype:
            places.append(Place(weakref.ref(slot.owner), slot.name, origin.name, origin.start, tensor.shape))
    result = SharedFile(Path(local.path).name, attachment, session, places)
    result.bind()
    return result


def make_private(trace: Trace, shared: Iterable[SharedFile]) -> None:
    """Give every slot that is not shared what stock would have left there: an own, dense tensor in stock's dtype."""
    placed = {place.key for file in shared for place in file.places}
    with torch.inference_mode(False):
        for slot in trace.slots:
            tensor = slot.tensor
            if tensor is None or slot.key in placed:
                continue
            if trace.locate(tensor) is None and tensor.dtype == slot.dtype and tensor.is_contiguous():
                continue
            own = tensor.detach().to(slot.dtype, copy=True).contiguous()
            if slot.is_buffer:
                slot.owner._buffers[slot.name] = own
            else:
                slot.owner._parameters[slot.name] = torch.nn.Parameter(own, requires_grad=False)


def private_tensors(model: torch.nn.Module, files: Iterable[SharedFile]) -> list[tuple[str, torch.Tensor]]:
    """Name and tensor of every parameter and buffer of ``model`` that belongs to this process alone (I7)."""
    placed = {place.key for file in files for place in file.places}
    return [
        (f"{path}.{name}", tensor)
        for path, module in model.named_modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None and (id(module), name) not in placed
    ]
