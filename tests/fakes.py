"""Stand-ins that behave: a clock that is set by hand, memory in a bytearray, an outbox that keeps what it is given."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np
from typing_extensions import Buffer

from lunashm import protocol as p
from lunashm.errors import OutOfSharedMemory, SegmentFrozen, SegmentGone, SegmentNotFrozen
from lunashm.host.loading import Job
from lunashm.host.service import Service


class FakeClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class HeapSegment:
    """Kept honest by the contract suite."""

    def __init__(self, rung: HeapRung, name: str, nbytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self.frozen = False
        self.freed = False
        self._rung = rung
        self._bytes = bytearray(nbytes)

    def write(self, offset: int, data: Buffer) -> None:
        self._check_there()
        if self.frozen:
            raise SegmentFrozen(self.name)
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > self.nbytes:
            raise ValueError(f"{len(view)} bytes at {offset}")
        self._bytes[offset : offset + len(view)] = view

    def freeze(self) -> None:
        self._check_there()
        self.frozen = True

    def export(self) -> p.Handle:
        self._check_there()
        if not self.frozen:
            raise SegmentNotFrozen(self.name)
        return p.Handle(self._rung.name, self._rung.device, self.nbytes, self.name.encode())

    def descriptor(self) -> None:
        self.export()

    def free(self) -> None:
        self.freed = True
        self._rung.segments.pop(self.name, None)

    def _check_there(self) -> None:
        if self.freed:
            raise SegmentGone(self.name)


class HeapMapping(np.ndarray):
    """Read-only bytes that can be weakly referenced."""

    handle: p.Handle

    def peek(self, offset: int, nbytes: int) -> memoryview:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise ValueError(f"{nbytes} bytes at {offset}")
        return memoryview(self)[offset : offset + nbytes]

    def when_gone(self, callback: Callable[[], object]) -> None:
        weakref.finalize(self, callback).atexit = False


def heap_mapping(data: bytes | bytearray, handle: p.Handle | None = None) -> HeapMapping:
    mapping = np.frombuffer(bytes(data), np.uint8).view(HeapMapping)
    mapping.handle = handle or p.Handle("heap", "cpu", len(data), b"")
    return mapping


class HeapRung:
    """Memory of this process alone, with a size that tests choose."""

    name = "heap"
    device = "cpu"
    outlives_host = False

    def __init__(self, size: int = 1 << 24) -> None:
        self.size = size
        self.segments: dict[str, HeapSegment] = {}
        self._ids = itertools.count(1)

    def allocate(self, nbytes: int) -> HeapSegment:
        if nbytes <= 0:
            raise ValueError(nbytes)
        if nbytes > self.free_nbytes():
            raise OutOfSharedMemory(f"{nbytes / 1e6:.1f} MB needed, {self.free_nbytes() / 1e6:.1f} MB free")
        segment = HeapSegment(self, f"heap-{next(self._ids)}", nbytes)
        self.segments[segment.name] = segment
        return segment

    def open(self, handle: p.Handle, descriptor: int | None = None) -> HeapMapping:
        segment = self.segments.get(handle.data.decode(errors="replace"))
        if segment is None or segment.nbytes != handle.nbytes:
            raise SegmentGone(f"{handle.data!r}")
        return heap_mapping(segment._bytes, handle)

    def staging(self, nbytes: int) -> AbstractContextManager[memoryview]:
        return contextlib.nullcontext(memoryview(bytearray(nbytes)))

    def free_nbytes(self) -> int:
        return self.size - sum(segment.nbytes for segment in self.segments.values())

    def total_nbytes(self) -> int:
        return self.size

    def reclaim(self) -> list[str]:
        return []


@dataclass
class FakeOutbox:
    """``deaf``: routes that nobody reads any more."""

    replies: list[tuple[bytes, int, p.Message]] = field(default_factory=list)
    events: list[p.Message] = field(default_factory=list)
    deaf: set[bytes] = field(default_factory=set)

    def reply(self, route: bytes, message_id: int, message: p.Message) -> bool:
        if route in self.deaf:
            return False
        self.replies.append((route, message_id, message))
        return True

    def publish(self, event: p.Message) -> None:
        self.events.append(event)


class Worker:
    """Runs jobs when the test says so, in the test's thread."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

    def run(self, service: Service, rung: HeapRung) -> int:
        """All jobs, those included that finishing one starts. Returns how many there were."""
        count = 0
        while self.jobs:
            job = self.jobs.pop(0)
            try:
                result = job.run(rung)
            except Exception as exc:  # noqa: BLE001 - as the server's worker thread does
                service.finish(job, exc)
            else:
                service.finish(job, result)
            count += 1
            assert count < 50, "jobs without end"
        return count
