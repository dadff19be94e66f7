"""Load jobs: one per file and set of dtypes, whoever asks how often. The work runs in a thread, the book-keeping does not."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from lunashm.errors import LoadCancelled
from lunashm.host import checkpoint, loader
from lunashm.host.checkpoint import Checkpoint
from lunashm.manifest import DtypeRule, RuleBook, Source
from lunashm.memory import Rung
from lunashm.protocol import Attach, Load


@dataclass(frozen=True)
class Waiter:
    """One parked request: ``route`` and ``message_id`` say where the answer goes, ``deadline`` (clock) until when."""

    route: bytes
    message_id: int
    request: Attach | Load
    deadline: float


@dataclass(frozen=True)
class Outcome:
    """What a job brought back; ``loaded`` is None when the bytes proved to be ``digest``, which the host already has."""

    checkpoint: Checkpoint
    layout: loader.Layout
    loaded: loader.LoadedSegment | None
    digest: str
    elapsed_s: float


@dataclass
class Job:
    """``known``: digests that the host holds for this path; they are looked for before any memory is taken."""

    source: Source
    rules: tuple[DtypeRule, ...]
    known: frozenset[str]
    waiters: list[Waiter] = field(default_factory=list)
    done: int = 0
    total: int = 0
    started: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)

    @property
    def name(self) -> str:
        return self.source.path.rpartition("/")[2]

    def would_satisfy(self, rules: tuple[DtypeRule, ...]) -> bool:
        """Whether a client that wants ``rules`` can simply wait for this job."""
        return not self.cancelled.is_set() and all(RuleBook(self.rules).wanted(r.prefix) == r.dtype for r in rules)

    def run(self, rung: Rung) -> Outcome:
        """In a worker thread. Raises whatever reading, validating or allocating raises."""
        started = time.monotonic()
        found = checkpoint.read(Path(self.source.path))
        layout = loader.plan(found, self.rules)
        self.total = found.source.size
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
