"""N servers on one GPU, N growing in one run: idle, attached and peak memory, and what they render together.

At each N the new servers start beside those that are there and have rendered, each renders its first prompt in turn,
then all render at once. idle: what all of them, and the host, added by starting. attached: all have rendered, memory
stands still. in turn: the highest while first prompts ran one after the other. peak: the highest of the whole level,
everybody rendering at once included. All are of the whole device, less what was in use before the first process.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from bench.comfy_events import Events
from bench.comfy_server import ComfyError, ComfyServer
from bench.gpu import memory_sharing, sdxl
from bench.gpu.device_memory import Meter, Watch, meter_of
from bench.gpu.memory_start import started
from bench.gpu.part import Context
from bench.host import HostProcess
from bench.workflows import again
from bench.workload import Workload

GB = 1e9
MARGIN_NBYTES = 2 << 30
PROMPT_TIMEOUT_S = 240.0


@dataclass(frozen=True)
class Level:
    """What N servers held (bytes over what was in use before), and did."""

    count: int
    idle: int
    attached: int
    in_turn: int
    peak: int
    rate_hz: float
    load_s: tuple[float, ...]
    images: tuple[bytes, ...]
    together_s: float
    rendered: int

    @property
    def images_a_minute(self) -> float:
        return self.rendered / self.together_s * 60


@dataclass
class Fleet:
    """All levels that ran, by N, and why others did not."""

    kind: str
    unit: str
    before: int = 0
    weights: int = 0
    levels: dict[int, Level] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Means:
    """What a fleet is made of, and measured with.

    start  makes and starts so many more servers; gets the host of those that share
    host   starts the host; None where nothing is shared
    each   prompts of a server when all of so many render at once
    """

    work: Workload
    meter: Meter
    start: Callable[[HostProcess | None, int], Sequence[ComfyServer]]
    host: Callable[[], HostProcess] | None
    each: Callable[[int], int]


class Growth:
    """One kind of server ("stock" or "shared"), more and more of them."""

    def __init__(self, kind: str, means: Means, stack: contextlib.ExitStack) -> None:
        self._means, self._stack = means, stack
        self._work, self._meter = means.work, means.meter
        self.fleet = Fleet(kind, means.meter.unit)
        self.fleet.before = self._meter.settled()
        self._host = means.host() if means.host is not None else None
        self._idle = 0
        self._servers: list[ComfyServer] = []
        self._events: list[Events] = []

    def no_room(self, count: int) -> str | None:
        """Why so many stock servers are left out, by what one of them took."""
        one = self.fleet.levels.get(1)
        if self.fleet.kind != "stock" or one is None:
            return None
        need, free = MARGIN_NBYTES + count * one.attached, self._meter.total() - self.fleet.before
        if need <= free:
            return None
        return f"stock N={count} was left out: it needs about {need / GB:.1f} GB, there are {free / GB:.1f} GB"

    def grow(self, count: int) -> None:
        """Raises ComfyError, and NotShared."""
        before_start = self._meter.settled() if self._servers else self.fleet.before
        fresh = self._start(count - len(self._servers))
        self._idle += self._meter.settled() - before_start
        self._work.warm()
        load_s, images = [], []
        with Watch(self._meter) as watch:
            for server, events in fresh:
                timed = events.run(self._work.graph, PROMPT_TIMEOUT_S)
                load_s.append(timed.node_s.get("checkpoint", float("nan")))
                images.append(server.image(timed.entry))
        attached = self._meter.settled()
        if self._host is not None:
            memory_sharing.check(self._host, self._servers, self._work.nbytes)
            self.fleet.weights = memory_sharing.shared_nbytes(self._host)
        before, took_s, rendered = self.fleet.before, float("nan"), 0
        failed: ComfyError | None = None
        with Watch(self._meter) as together:
            try:
                took_s, rendered = self._all_at_once(count)
            except ComfyError as exc:  # what they held until then is known
                failed = exc
        level = Level(
            count, self._idle, attached - before, max(watch.peak, attached) - before,
            max(watch.peak, together.peak, attached) - before, together.rate_hz, tuple(load_s), tuple(images),
            took_s, rendered,
        )  # fmt: skip
        self.fleet.levels[count] = level
        if failed is not None:
            raise failed

    def last_words(self) -> str:
        """What the logs of the servers end with, those that died first."""
        dead = [server for server in self._servers if not server.alive] or self._servers[-1:]
        return "\n".join(sdxl.log_tail(server) for server in dead[:2])

    def _start(self, number: int) -> list[tuple[ComfyServer, Events]]:
        servers = self._means.start(self._host, number)
        self._servers += servers
        events = [self._stack.enter_context(Events(server)) for server in servers]
        self._events += events
        self._meter.follow([server.pid for server in self._servers], self._host.pid if self._host else None)
        return list(zip(servers, events, strict=True))

    def _all_at_once(self, count: int) -> tuple[float, int]:
        """Seconds, and how many prompts were rendered in them; every server renders as many."""
        each = self._means.each(count)

        def render(events: Events) -> None:
            for number in range(each):
                events.run(again(self._work.graph, 1000 * count + number), PROMPT_TIMEOUT_S)

        began = time.monotonic()
        with ThreadPoolExecutor(count) as pool:
            list(pool.map(render, self._events))
        return time.monotonic() - began, each * count


def grown(
    context: Context,
    kind: str,
    counts: Sequence[int],
    environment: Mapping[str, str] | None = None,
) -> Fleet:
    """Of servers with SDXL. `environment`: further variables of servers and host."""
    with contextlib.ExitStack() as stack:
        work, variables = sdxl.workload(context), dict(environment or {})

        def start(host: HostProcess | None, number: int) -> Sequence[ComfyServer]:
            return started(stack, [work.server(host, environment=variables) for _ in range(number)])

        def host() -> HostProcess:
            return stack.enter_context(work.host(sdxl.device_of(context), "auto", variables))

        def each(count: int) -> int:
            return 1 if context.dry or count >= 4 else 2

        means = Means(work, meter_of(context), start, host if kind == "shared" else None, each)
        return levels(kind, counts, means, stack)


def levels(kind: str, counts: Sequence[int], means: Means, stack: contextlib.ExitStack) -> Fleet:
    """Level after level; what goes wrong ends it with a note, and what was found before stays."""
    growth = Growth(kind, means, stack)
    for count in counts:
        why = growth.no_room(count)
        try:
            if why is None:
                growth.grow(count)
                continue
        except memory_sharing.NotShared as exc:
            why = f"{kind} N={count}: not shared, so it has no figures: {exc}"
        except ComfyError as exc:
            why = f"{kind} N={count} failed: {str(exc)[:1500]}\n--- last log lines ---\n{growth.last_words()}"
        growth.fleet.notes.append(why)
        break
    return growth.fleet
