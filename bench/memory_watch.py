"""Memory of a group of processes that share pages, over time. Starts none of them.

The measure is the sum of PSS (proportional set size): a page that k processes map counts 1/k in each, so over all of
them every page counts once, and a segment that just one process maps counts there in full. A shared memory page that
the host has filled but nobody maps yet is in no process's PSS; the host's segments are therefore asked for their
size, and what PSS does not cover of it is added ("unmapped"). Nothing of the weights can hide.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from bench.process_memory import held_shared_memory, tree_memory

PERIOD_S = 0.2
STILL_NBYTES = 4 << 20


@dataclass(frozen=True)
class Usage:
    """Bytes at one moment. `servers`: PSS of each; `private`: what each alone maps; `segments`: the host's, in all."""

    at_s: float
    servers: tuple[int, ...]
    private: tuple[int, ...]
    host: int
    segments: int
    unmapped: int

    @property
    def total(self) -> int:
        return sum(self.servers) + self.host + self.unmapped


def usage(servers: Sequence[int], host: int | None = None) -> Usage:
    """Now, of these processes and their descendants. Raises ProcessLookupError if one is gone."""
    found = [tree_memory(pid) for pid in servers]
    own = tree_memory(host) if host is not None else {"pss": 0, "shmem": 0}
    segments = held_shared_memory(host) if host is not None else 0
    mapped = own["shmem"] + sum(memory["shmem"] for memory in found)
    return Usage(
        at_s=time.monotonic(),
        servers=tuple(memory["pss"] for memory in found),
        private=tuple(memory["private"] for memory in found),
        host=own["pss"],
        segments=segments,
        unmapped=max(0, segments - mapped),
    )


def settled(servers: Sequence[int], host: int | None = None, timeout_s: float = 20.0) -> Usage:
    """The usage once it stands still for a second; as it is at the deadline otherwise."""
    deadline, still, last = time.monotonic() + timeout_s, 0, usage(servers, host)
    while still < 4 and time.monotonic() < deadline:
        time.sleep(0.25)
        now = usage(servers, host)
        still, last = (still + 1 if abs(now.total - last.total) < STILL_NBYTES else 0), now
    return last


class MemoryWatch:
    """Context manager: samples in a thread of its own until exit; `samples` holds what it saw."""

    def __init__(self, servers: Sequence[int], host: int | None = None) -> None:
        self.samples: list[Usage] = []
        self._servers, self._host = list(servers), host
        self._failed: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        self.samples.append(usage(self._servers, self._host))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if exc is None and self._failed is not None:
            raise self._failed

    @property
    def peak(self) -> int:
        return max(sample.total for sample in self.samples)

    @property
    def rate_hz(self) -> float:
        """Samples a second that were really taken."""
        took_s = self.samples[-1].at_s - self.samples[0].at_s
        return (len(self.samples) - 1) / took_s if took_s > 0 else 0.0

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            try:
                self.samples.append(usage(self._servers, self._host))
            except OSError as exc:
                self._failed = exc
                return
            due = max(due + PERIOD_S, time.monotonic())
            self._stop.wait(due - time.monotonic())
