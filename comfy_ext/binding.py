"""The host's bytes in a module's parameters: put there once, and again when a new host comes up.

Parameters are shared, buffers are private clones (some layers write them). Nothing is left that still points into
the loader's own mapping of the file.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lunashm.client import Attachment, Session
from lunashm.errors import InvalidCheckpoint, LunashmError, SourceChanged
from lunashm.manifest import DtypeRule
from lunashm.views import NAMES

from .rules import rules_for
from .trace import FileTensors, Origin, Slot, Trace

log = logging.getLogger("lunashm.comfy")

_RETRY_S = 1.0

live: weakref.WeakSet[SharedFile] = weakref.WeakSet()
"""Every shared file some model of this process still shows."""


@dataclass(frozen=True)
class Place:
    """A parameter and the stretch of a shared tensor it shows: ``start`` in elements, row-major.

    The owner is held weakly: UNet, CLIP and VAE of one checkpoint share a file, and none may keep another alive.
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
    def key(self) -> tuple[int, str]:
        """Identifies the parameter while its owner lives."""
        return id(self.owner()), self.name


class SharedFile:
    """One attached file and every place that shows it. Several models (UNet, CLIP, VAE) may share one."""

    def __init__(self, attachment: Attachment, session: Session, places: list[Place], wait_s: float) -> None:
        self.attachment = attachment
        self._session = session
        self._places = places
        self._wait_s = wait_s
        self._next_try = 0.0
        self._told = ""
        live.add(self)

    def bind(self) -> None:
        with torch.inference_mode(False):
            shared = self.attachment.state_dict()
            for place in self._places:
                place.bind(shared)

    @property
    def places(self) -> list[Place]:
        return self._places

    @property
    def nbytes(self) -> int:
        """Bytes of all places, each counted once."""
        shared = self.attachment.state_dict()
        return sum(place.shape.numel() * shared[place.tensor].element_size() for place in self._places)

    def stale(self) -> bool:
        """Whether the host that lent these bytes is gone and another is there. Cheap enough for every prompt."""
        if self.attachment.attached or time.monotonic() < self._next_try:
            return False
        self._next_try = time.monotonic() + _RETRY_S
        return self._session.host is not None or self._session.host_is_back()

    def refresh(self) -> None:
        """Attach to the host that is there now and let go of the old mapping. On failure the old one stays in use."""
        old = self.attachment
        try:
            self.attachment = old.reattached(self._wait_s)
        except LunashmError as exc:
            if exc.message != self._told:
                self._told = exc.message
                log.warning("[lunashm] %s stays on the old copy: %s", old.manifest.name, exc)
            return
        self.bind()
        old.close()
        log.info("[lunashm] re-attached %s to host pid %d", old.manifest.name, self._session.host.pid)  # type: ignore[union-attr]


class Binding:
    """What one model (a root module) shares. Kept on the module as ``lunashm``, so that all its patchers see it."""

    def __init__(self, files: list[SharedFile], private_nbytes: int) -> None:
        self.files = files
        self.private_nbytes = private_nbytes

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None  # a deep copy of the module has private parameters: nothing is bound there

    def stale(self) -> bool:
        return any(file.stale() for file in self.files)

    def refresh(self) -> None:
        for file in self.files:
            if not file.attachment.attached:
                file.refresh()


def needed_rules(file: FileTensors, trace: Trace) -> tuple[DtypeRule, ...] | None:
    """The dtype rules to ask the host for, so that each parameter gets what stock would have made.

    None where no parameter shows the file: there is nothing to share.
    """
    wanted: dict[str, str] = {}
    for slot in trace.slots:
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
    if slot.is_buffer or slot.origin is None or not tensor.is_contiguous():
        return None
    if trace.locate(tensor) is not None:
        return slot.origin
    before = slot.origin.stretch(tensor.shape).to(tensor.dtype)
    return slot.origin if tensor.dtype == slot.dtype and torch.equal(before, tensor) else None


def bind(trace: Trace, file: FileTensors, attachment: Attachment, session: Session, wait_s: float) -> SharedFile:
    """Point every parameter that came from ``file`` at the host's bytes.

    Raises SourceChanged if host and loader read different files, InvalidCheckpoint if a tensor is missing or differs.
    """
    source, local = attachment.manifest.source, file.identity
    if (source.size, source.mtime_ns) != (local.size, local.mtime_ns):
        raise SourceChanged(f"{local.path} changed while it was being attached; queue the prompt again")
    shared = attachment.state_dict()
    places = []
    for slot in trace.slots:
        origin = shareable(slot, trace)
        if origin is None or origin.file is not file:
            continue
        theirs = shared.get(origin.name)
        if theirs is None or theirs.shape != file.tensors[origin.name].shape:
            raise InvalidCheckpoint(f"host's copy of {local.path} lacks {origin.name!r}; unload it and load it again")
        if theirs.dtype == slot.dtype:
            places.append(Place(weakref.ref(slot.owner), slot.name, origin.name, origin.start, slot.tensor.shape))
    result = SharedFile(attachment, session, places, wait_s)
    result.bind()
    return result


def make_private(trace: Trace, shared: Iterable[SharedFile]) -> list[Slot]:
    """Give every slot that is not shared what stock would have left there: an own, dense tensor in stock's dtype.

    Returns those slots, for the report (I7).
    """
    placed = {place.key for file in shared for place in file.places}
    private = [slot for slot in trace.slots if slot.key not in placed]
    with torch.inference_mode(False):
        for slot in private:
            tensor = slot.tensor.detach()
            if trace.locate(tensor) is None and tensor.dtype == slot.dtype and tensor.is_contiguous():
                continue
            own = tensor.to(slot.dtype, copy=True).contiguous()
            if slot.is_buffer:
                slot.owner._buffers[slot.name] = own
            else:
                slot.owner._parameters[slot.name] = torch.nn.Parameter(own, requires_grad=False)
    return private
