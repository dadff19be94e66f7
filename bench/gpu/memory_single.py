"""One server, stock against shared, side by side on one GPU and taking turns: time per step, load node, image.

A step's time is the difference of a long and a short prompt's sampling node, over the difference of their steps: what
is not a step (moving the model in, the first kernel, waiting for the device at the end) is in both. Both prompts of a
server follow one another, then it is the other server's turn; the order alternates. The figure is the median of ratios
within such a round. Decoding and saving are in the whole prompt's time, which is another figure.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.comfy_events import Events, Timed
from bench.comfy_server import ComfyServer
from bench.gpu import memory_sharing, sdxl
from bench.gpu.memory_start import started
from bench.gpu.part import Context, Measured
from bench.gpu.sdxl import Size
from bench.report import Figure, median
from bench.workflows import Graph, again

KINDS = ("stock", "shared")
PERCENT = 100.0


@dataclass
class Renders:
    """What one server took: the first prompt, then seconds of a step and of a whole long prompt, round by round."""

    first: Timed
    image: bytes
    step_s: list[float] = field(default_factory=list)
    prompt_s: list[float] = field(default_factory=list)


class Bench:
    """One server with its websocket, and what it rendered."""

    def __init__(self, server: ComfyServer, events: Events, make: Callable[[int], Graph], size: Size) -> None:
        self.server, self._events, self._make, self._size = server, events, make, size
        first = events.run(make(size.long))
        self.renders = Renders(first, server.image(first.entry))

    def round(self, number: int) -> None:
        short, long = (
            self._events.run(again(self._make(steps), number)) for steps in (self._size.short, self._size.long)
        )
        steps = self._size.long - self._size.short
        self.renders.step_s.append((long.node_s["sampler"] - short.node_s["sampler"]) / steps)
        self.renders.prompt_s.append(long.total_s)


def rounds_of(context: Context) -> int:
    return 1 if context.dry else 8


def run(context: Context) -> Measured:
    work, size = sdxl.workload(context), sdxl.size_of(context)
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(work.host(sdxl.device_of(context), mode="auto"))
        servers = started(stack, [work.server(), work.server(host)])
        benches = {}
        for kind, server in zip(KINDS, servers, strict=True):
            events = stack.enter_context(Events(server))
            benches[kind] = Bench(server, events, lambda steps: sdxl.graph(context, steps), size)
        notes = []
        try:
            memory_sharing.check(host, [servers[1]], work.nbytes)
        except memory_sharing.NotShared as exc:
            return Measured(_load_figures(benches["stock"].renders), notes=[f"nothing is compared: {exc}"])
        for number in range(rounds_of(context)):
            for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
                benches[kind].round(number)
        found = {kind: bench.renders for kind, bench in benches.items()}
        notes.append("; ".join(memory_sharing.said(servers[1])[-2:]))
        facts = {f"{kind}: SHA-256 of the images": [_digest(found[kind].image)] for kind in KINDS}
        return Measured(figures(found), samples(found), facts, notes)


def _digest(image: bytes) -> str:
    return hashlib.sha256(image).hexdigest()[:16]


def _load_figures(renders: Renders, kind: str = "stock") -> list[Figure]:
    load_s = renders.first.node_s.get("checkpoint", float("nan"))
    cold = ", host not yet warm" if kind == "shared" else ", file in the page cache"
    return [Figure(f"one instance: load node, {kind}{cold}", load_s, "s")]


def figures(found: dict[str, Renders]) -> list[Figure]:
    stock, shared = (found[kind] for kind in KINDS)
    ratios = [ours / theirs for ours, theirs in zip(shared.step_s, stock.step_s, strict=True)]
    return [
        Figure("one instance: step, shared / stock, median of pairs", median(ratios), "ratio", "<= 1.01"),
        *(Figure(f"one instance: step, {kind}", median(found[kind].step_s), "s") for kind in KINDS),
        *(Figure(f"one instance: whole prompt, {kind}", median(found[kind].prompt_s), "s") for kind in KINDS),
        Figure(
            "one instance: image byte-identical to stock's", float(stock.image == shared.image), "share", ">= 1"
        ),
        *(figure for kind in KINDS for figure in _load_figures(found[kind], kind)),
    ]  # fmt: skip


def samples(found: dict[str, Renders]) -> dict[str, list[float]]:
    series = {f"one instance: step, {kind}, s": found[kind].step_s for kind in KINDS}
    series |= {f"one instance: whole prompt, {kind}, s": found[kind].prompt_s for kind in KINDS}
    pairs = zip(found["shared"].step_s, found["stock"].step_s, strict=True)
    return series | {"one instance: step, shared / stock": [ours / theirs for ours, theirs in pairs]}
