"""How much memory of the device is in use, by everybody: at one moment, once it stands still, at the peak.

NVML's figure for the whole device, contexts and what the driver keeps included; its figures for single processes are
not used (whether they count shared memory is not documented). In a dry run, where nothing is on a device, the sum of
PSS of the processes stands in for it (bench.memory_watch), so that the same code runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from bench.gpu.part import Context
from bench.memory_watch import PERIOD_S, usage
from lunashm.memory import cuda
from lunashm.usage import Unseen
from lunashm.usage.nvml import Nvml

DEVICE_PERIOD_S = 0.02
STILL_NBYTES = 4 << 20
LOOK_S = 0.25

Read = Callable[[], int]


class MemoryUnseen(Exception):
    """The device's memory cannot be read; the message says why."""


class Meter:
    """Bytes in use. `follow` the processes that count, where it is they that are asked."""

    unit = "device memory"

    def __init__(self, context: Context) -> None:
        """Makes no CUDA context: that would take memory of the device itself."""
        self._nvml = Nvml()
        self._uuid = cuda.resolve(context.device)

    @property
    def period_s(self) -> float:
        return DEVICE_PERIOD_S

    def follow(self, servers: Sequence[int], host: int | None) -> None:
        """The device knows by itself."""

    def read(self) -> int:
        return self._memory()[0]

    def total(self) -> int:
        """Of the device."""
        return self._memory()[1]

    def _memory(self) -> tuple[int, int]:
        found = self._nvml.memory(self._uuid)
        if isinstance(found, Unseen):
            raise MemoryUnseen(f"memory of {self._uuid}: {found.reason}")
        return found.used, found.total

    def settled(self, timeout_s: float = 20.0) -> int:
        """Bytes once they stand still for a second; as they are at the deadline otherwise."""
        deadline, still, last = time.monotonic() + timeout_s, 0, self.read()
        while still < 4 and time.monotonic() < deadline:
            time.sleep(LOOK_S)
            now = self.read()
            still, last = (still + 1 if abs(now - last) < STILL_NBYTES else 0), now
        return last


class PssMeter(Meter):
    """What stands in for it in a dry run: the sum of PSS of those that are followed, the host's segments included."""

    unit = "sum of PSS (dry run)"

    def __init__(self) -> None:
        self._servers: list[int] = []
        self._host: int | None = None

    @property
    def period_s(self) -> float:
        return PERIOD_S

    def follow(self, servers: Sequence[int], host: int | None) -> None:
        self._servers, self._host = list(servers), host

    def read(self) -> int:
        return usage(self._servers, self._host).total if self._servers or self._host is not None else 0

    def total(self) -> int:
        return 1 << 50  # nothing is left out for want of room


def meter_of(context: Context) -> Meter:
    return PssMeter() if context.dry else Meter(context)


class Watch:
    """Context manager: samples in a thread of its own until exit."""

    def __init__(self, meter: Meter) -> None:
        self.samples: list[tuple[float, int]] = []
        self._meter = meter
        self._failed: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device-memory", daemon=True)

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if exc is None and self._failed is not None:
            raise self._failed

    @property
    def peak(self) -> int:
        return max(nbytes for _, nbytes in self.samples)

    @property
    def rate_hz(self) -> float:
        """Samples a second that were really taken."""
        took_s = self.samples[-1][0] - self.samples[0][0]
        return (len(self.samples) - 1) / took_s if took_s > 0 else 0.0

    def _look(self) -> None:
        self.samples.append((time.monotonic(), self._meter.read()))

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            try:
                self._look()
            except (MemoryUnseen, OSError) as exc:
                self._failed = exc
                return
            due = max(due + self._meter.period_s, time.monotonic())
            self._stop.wait(due - time.monotonic())
