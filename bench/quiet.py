"""Who else used the machine while something was timed: a timing on a busy machine measures its other users.

The share is of the cores: all CPU time the machine spent (/proc/stat) less that of the processes that are being timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
QUIET_CORES = 0.25
"""Others' use below which a timing counts as undisturbed."""


def cpu_s(pid: int) -> float:
    """User and system time of a process so far, in seconds; ended threads and reaped children included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / TICKS


def machine_s() -> float:
    """CPU time that all processes of the machine had so far, in seconds; stolen time counts as another's."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = Path("/proc/stat").read_text().split()[1:9]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / TICKS


class Stopwatch:
    """Wall time, and cores that others than `pids` (and this process) used meanwhile."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._pids = [*pids, os.getpid()]
        self._own_s, self._all_s, self._began = self._own(), machine_s(), time.monotonic()

    def read(self) -> tuple[float, float]:
        """Seconds since the start, and others' cores."""
        took_s = time.monotonic() - self._began
        others_s = (machine_s() - self._all_s) - (self._own() - self._own_s)
        return took_s, max(0.0, others_s / took_s)

    def _own(self) -> float:
        return sum(cpu_s(pid) for pid in self._pids)
