"""What host, clients and device hold: at one moment, and while something runs.

Of the host and of a client: anonymous memory, which is what a leak grows and nobody shares; the kernel has it at hand,
so it can be followed closely. Of the device: on a GPU what NVML says of all of it, else the sum of PSS of the host and
the clients, in which every page counts once, however many map it (bench.memory_watch).
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from bench.acceptance.findings import Findings
from bench.comfy_server import ComfyServer
from bench.gpu.device_memory import Meter, PssMeter
from bench.gpu.memory_sharing import shared_nbytes
from bench.host import HostProcess
from bench.process_memory import resident
from bench.report import median
from lunashm.memory import ram

MB = 1e6
_PERIOD_S = 0.005


class RamMeter(PssMeter):
    """The device's memory of a machine that computes in RAM."""

    unit = "sum of PSS"

    def total(self) -> int:
        """As much as those that are followed may use."""
        return ram.available() + self.read()


@dataclass(frozen=True)
class Held:
    """Bytes. ``lent``: the host's segments."""

    host: int
    clients: tuple[int, ...]
    device: int
    lent: int


def held(meter: Meter, host: HostProcess, clients: Sequence[ComfyServer]) -> Held:
    """Now. ``meter`` is to follow them."""
    return Held(
        resident(host.pid).anonymous, tuple(resident(client.pid).anonymous for client in clients), meter.read(),
        shared_nbytes(host),
    )  # fmt: skip


STEADY_MB = 0.1
"""A prompt or a sampling step, by the median of the differences between looks. ComfyUI keeps each prompt and its
outputs in its history, some tens of KB. The smallest thing that could stay behind at each prompt, the factors of one
LoRA, has more than 1 MB; a step's activations have more."""
ENOUGH = 5
"""Looks for a median to be one."""
CLIENT_MB, HOST_MB = 64, 8
"""In all, at the highest look. A client's allocator (glibc) keeps blocks of up to 32 MB where it first gave them back
to the system: one or two such steps come at some time, in stock ComfyUI, too, and never again."""


def claim_flat(found: Findings, over: str, looks: Sequence[Held], each: int) -> None:
    """That nothing grows from look to look, with ``each`` prompts or steps of a client between two of them.

    The first look is the measure: what allocators keep for the next time is to be there by then.
    """
    count = len(looks[0].clients)
    clients = [[look.clients[number] for look in looks] for number in range(count)]
    host = [look.host for look in looks]
    if len(looks) >= ENOUGH:
        steady = max(_steadily(series) / each for series in clients)
        found.figure(f"steady growth over {over}, a client", steady, "MB each", f"<= {STEADY_MB}")
        found.figure(f"steady growth over {over}, the host", _steadily(host) / each, "MB each", f"<= {STEADY_MB}")
    found.figure(f"growth over {over}, a client", max(map(_grown, clients)), "MB", f"<= {CLIENT_MB}")
    found.figure(f"growth over {over}, the host", _grown(host), "MB", f"<= {HOST_MB}")
    found.figure(f"growth over {over}, what the host lends", _grown([look.lent for look in looks]), "MB", "<= 0")
    device = [look.device for look in looks]
    limit = CLIENT_MB * count + HOST_MB
    found.figure(f"growth over {over}, the device", _grown(device), "MB", f"<= {limit}")
    found.series({
        f"{over}: the host's own memory, MB": [nbytes / MB for nbytes in host],
        f"{over}: the clients' own memory, MB": [sum(look.clients) / MB for look in looks],
        f"{over}: the device's memory, MB": [nbytes / MB for nbytes in device],
    })  # fmt: skip


def in_words(looks: Sequence[Held]) -> str:
    """``host +0, clients +2, device +3 MB``: the highest look over the first one."""
    ways = {
        "host": [look.host for look in looks],
        "clients": [sum(look.clients) for look in looks],
        "device": [look.device for look in looks],
    }
    return ", ".join(f"{name} {_grown(series):+.0f}" for name, series in ways.items()) + " MB"


def _grown(series: Sequence[int]) -> float:
    """MB, the highest over the first: a peak that went away again counts, too."""
    return (max(series) - series[0]) / MB


def _steadily(series: Sequence[int]) -> float:
    """MB from look to look."""
    return median([(later - sooner) / MB for sooner, later in itertools.pairwise(series)])


def settled(read: Callable[[], int], still_nbytes: int = 1 << 20, timeout_s: float = 10.0) -> int:
    """What ``read`` gives once it stands still for half a second; what it gives at the deadline otherwise."""
    deadline, still, last = time.monotonic() + timeout_s, 0, read()
    while still < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
        now = read()
        still, last = (still + 1 if abs(now - last) < still_nbytes else 0), now
    return last


class Peak:
    """Context manager: follows a figure every 5 ms, or as often as it can be read. ``highest`` is what it saw."""

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._stop = threading.Event()
        self._failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="peak", daemon=True)
        self.highest = 0
        self.looks = 0

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if exc is None and self._failed is not None:
            raise self._failed
        if exc is None:
            self._look()

    def _look(self) -> None:
        self.highest = max(self.highest, self._read())
        self.looks += 1

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_S):
            try:
                self._look()
            except Exception as exc:  # noqa: BLE001 - raised where the figure is asked for
                self._failed = exc
                return
