"""Memory of processes that share pages, looked at often and walked rarely. Time and readings are arguments.

A walk (``ram.walked``) has the kernel look at every page. So all processes are walked in one round, as their shares of
one page belong together, and no more often than a small part of one core pays for. Between rounds only anonymous memory
is followed, which is what a running model changes. A round comes early when processes come or go, or when what they
map of files or shared memory changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from lunashm.usage import ProcessId, Unseen, ram
from lunashm.usage.ram import Ram, Resident

SHARE = 0.02
"""Of one core, for rounds when nothing happens."""

BUSY_SHARE = 0.2
"""While mappings change."""

CHANGE_NBYTES = 16 << 20
"""What of files and shared memory a process must have mapped or dropped for a round before its time."""


class Meter:
    """Of the processes of one host. ``cpu``: time this thread has used, the kernel's for it included."""

    def __init__(
        self,
        resident: Callable[[ProcessId], Resident | Unseen] = ram.resident,
        walked: Callable[[ProcessId, int], Ram | Unseen] = ram.walked,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        self._resident = resident
        self._walk = walked
        self._clock = clock
        self._cpu = cpu
        self._last: dict[ProcessId, tuple[Resident, Ram | Unseen]] = {}
        self._at = 0.0
        self._cost_s = 0.0

    def read(self, processes: Sequence[ProcessId]) -> dict[ProcessId, Ram | Unseen]:
        """Of each of them, now."""
        looked = {who: self._resident(who) for who in processes}
        here = {who: found for who, found in looked.items() if not isinstance(found, Unseen)}
        unseen = {who: found for who, found in looked.items() if isinstance(found, Unseen)}
        if self._due(here):
            self._round(here)
        return {who: self._carried(who, found) for who, found in here.items()} | unseen

    def _due(self, here: dict[ProcessId, Resident]) -> bool:
        if here.keys() != self._last.keys():
            return True
        past_s = self._clock() - self._at
        changed = any(_differs(found, self._last[who][0]) for who, found in here.items())
        return past_s * (BUSY_SHARE if changed else SHARE) >= self._cost_s

    def _round(self, here: dict[ProcessId, Resident]) -> None:
        began = self._cpu()
        self._last = {who: (found, self._walk(who, found.shared)) for who, found in here.items()}
        self._cost_s = self._cpu() - began
        self._at = self._clock()

    def _carried(self, who: ProcessId, now: Resident) -> Ram | Unseen:
        """The last round's, with what became of anonymous memory since."""
        then, found = self._last[who]
        if isinstance(found, Unseen):
            return found
        more = now.anonymous - then.anonymous
        return replace(found, pss=found.pss + more, private=max(0, found.private + more), shared=now.shared)


def _differs(now: Resident, then: Resident) -> bool:
    return max(abs(now.file - then.file), abs(now.shared - then.shared)) >= CHANGE_NBYTES
