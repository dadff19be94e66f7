"""One load: who waits for it, what it does in its worker thread, what it brings back."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from lunashm.errors import LoadCancelled
from lunashm.host import checkpoint, loader
from lunashm.host.checkpoint import Checkpoint
from lunashm.manifest import DtypeRule, RuleBook, Source, TensorSpec
from lunashm.memory import Rung
from lunashm.protocol import Attach, Load


@dataclass(frozen=True)
class Waiter:
    """One parked request: ``route`` and ``message_id`` say where the answer goes; asked ``since`` (clock)."""

    route: bytes
    message_id: int
    request: Attach | Load
    since: float

    @property
    def deadline(self) -> float:
        """Until when (clock) it waits."""
        return self.since + self.request.wait_s

    @property
    def client(self) -> str | None:
        """The registered client that asked; None for a load, which anybody may ask for."""
        return self.request.client if isinstance(self.request, Attach) else None


@dataclass(frozen=True)
class Outcome:
    """What a job brought back; ``loaded`` is None when the bytes proved to be ``digest``, known to the host."""

    checkpoint: Checkpoint
    layout: loader.Layout
    loaded: loader.LoadedSegment | None
    digest: str
    elapsed_s: float

    def discard(self) -> None:
        if self.loaded is not None:
            self.loaded.segment.free()


@dataclass(eq=False)
class Job:
    """``specs``: what it will serve. ``known``: digests that the host holds and this file may have; they are looked
    for before any memory is taken. ``started`` on the host's clock."""

    name: str
    source: Source
    rules: tuple[DtypeRule, ...]
    specs: tuple[TensorSpec, ...]
    known: frozenset[str]
    started: float
    waiters: list[Waiter] = field(default_factory=list)
    done: int = 0
    cancelled: threading.Event = field(default_factory=threading.Event)

    def would_satisfy(self, source: Source, rules: tuple[DtypeRule, ...]) -> bool:
        """Whether a client that wants this file in these dtypes can simply wait for this job."""
        if self.cancelled.is_set() or self.source != source:
            return False
        return self.rules == rules or RuleBook(rules).satisfied_by(self.specs)

    def is_called(self, name: str) -> bool:
        return name in (self.name, self.source.path)

    def take_waiters(self) -> list[Waiter]:
        """All of them, leaving none: each is answered once."""
        waiters, self.waiters = self.waiters, []
        return waiters

    def run(self, rung: Rung) -> Outcome:
        """In a worker thread. Raises whatever reading, validating or allocating raises."""
        started = time.monotonic()
        self._progress(0, self.source.size)
        found = checkpoint.read(Path(self.source.path))
        layout = loader.plan(found, self.rules)
        if self.known:
            digest = loader.digest(found, self._progress)
            if digest in self.known:
                return Outcome(found, layout, None, digest, time.monotonic() - started)
        loaded = loader.load(found, layout, rung, self._progress)
        return Outcome(found, layout, loaded, loaded.digest, time.monotonic() - started)

    def _progress(self, done: int, total: int) -> None:
        self.done = done
        if self.cancelled.is_set():
            raise LoadCancelled(f"{self.name} was unloaded at {done} of {total} bytes; load it again if you want it")
