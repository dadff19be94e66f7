"""LoRAs by stock LoraLoader nodes in two real servers with default flags, one stock and one shared, in turn.

A step's time is that of bench.gpu.memory_single: long less short prompt's sampling node. A switch is what the first
short prompt with another stack takes longer in its sampling node than the same prompt again: merging, moving, making
factors, whatever a server does. Pictures of both are compared pixel by pixel: stock merges and rounds the weights.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bench.comfy_events import Events
from bench.comfy_server import ComfyServer
from bench.gpu import memory_sharing, sdxl
from bench.gpu.memory_start import started
from bench.gpu.part import Context, Measured
from bench.lora_client import STRENGTH
from bench.report import Figure, median
from bench.workflows import Graph, Lora, again, pixels

KINDS = ("stock", "shared")
DEPTHS, DRY_DEPTHS = (0, 2, 8), (0, 2)
PERCENT = 100.0


@dataclass
class Turns:
    """One server's seconds by number of LoRAs, round by round, and its last picture of each."""

    step_s: dict[int, list[float]] = field(default_factory=dict)
    switch_s: dict[int, list[float]] = field(default_factory=dict)
    pictures: dict[int, bytes] = field(default_factory=dict)


class Server:
    """One server and what it is asked for."""

    def __init__(self, context: Context, server: ComfyServer, events: Events, loras: Sequence[Path]) -> None:
        self._context, self._server, self._events = context, server, events
        self._loras: list[Lora] = [(file.relative_to(file.parent.parent).as_posix(), STRENGTH, 0.0) for file in loras]
        self.turns = Turns()

    def turn(self, depth: int, number: int) -> None:
        """A stack of so many, after whatever was there before."""
        size = sdxl.size_of(self._context)

        def sampling(steps: int, nonce: int) -> float:
            timed = self._events.run(again(self._graph(depth, steps), nonce))
            self.turns.pictures[depth] = self._server.image(timed.entry)
            return timed.node_s["sampler"]

        first, then = sampling(size.short, 3 * number), sampling(size.short, 3 * number + 1)
        long = sampling(size.long, 3 * number + 2)
        self.turns.switch_s.setdefault(depth, []).append(first - then)
        self.turns.step_s.setdefault(depth, []).append((long - then) / (size.long - size.short))

    def _graph(self, depth: int, steps: int) -> Graph:
        return sdxl.graph(self._context, steps, self._loras[:depth])


def run(context: Context, loras: Sequence[Path]) -> Measured:
    work = sdxl.workload(context)
    depths, rounds = (DRY_DEPTHS, 1) if context.dry else (DEPTHS, 4)
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(work.host(sdxl.device_of(context), mode="auto"))
        up = started(stack, [work.server(), work.server(host)])
        servers = {
            kind: Server(context, server, stack.enter_context(Events(server)), loras)
            for kind, server in zip(KINDS, up, strict=True)
        }
        for number in range(rounds + 1):
            for depth in depths:
                for kind in KINDS if number % 2 == 0 else KINDS[::-1]:
                    servers[kind].turn(depth, number)
            if number == 0:
                try:
                    memory_sharing.check(host, up[1:], work.nbytes)
                except memory_sharing.NotShared as exc:
                    return Measured(notes=[f"nothing is compared: {exc}"])
        notes = [line for server in up for line in memory_sharing.patched(server)[-2:]]
    found = {kind: server.turns for kind, server in servers.items()}
    return Measured(figures(found, depths), samples(found), notes=notes)


def figures(found: dict[str, Turns], depths: Sequence[int]) -> list[Figure]:
    """The first round of each is not counted: it loads files and makes what is kept."""
    series = []
    for depth in depths:
        for kind in KINDS:
            turns = found[kind]
            steps = turns.step_s[depth][1:]
            series.append(Figure(f"server, {depth} LoRAs: step, {kind}", median(steps), "s"))
            if depth:
                bare = zip(steps, turns.step_s[0][1:], strict=True)
                over = median([with_loras / without - 1 for with_loras, without in bare])
                series.append(Figure(f"server, {depth} LoRAs: step over none, {kind}", over * PERCENT, "%"))
            label = f"server, switch to {depth} LoRAs: first sampling over a later one, {kind}"
            series.append(Figure(label, median(turns.switch_s[depth][1:]), "s"))
        ours, theirs = (pixels(found[kind].pictures[depth]).astype(np.float64) for kind in ("shared", "stock"))
        furthest = float(abs(ours - theirs).max())
        series.append(Figure(f"server, {depth} LoRAs: largest difference of a pixel", furthest, "of 255"))
        series.append(Figure(f"server, {depth} LoRAs: PSNR against stock", psnr(ours, theirs), "dB"))
    return series


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Of 8-bit pictures; of equal ones it is infinite, said as 999."""
    error = float(((ours - theirs) ** 2).mean())
    return 999.0 if error == 0 else 10 * math.log10(255**2 / error)


def samples(found: dict[str, Turns]) -> dict[str, list[float]]:
    series: dict[str, list[float]] = {}
    for kind, turns in found.items():
        series |= {f"server, {depth} LoRAs: step, {kind}, s": values for depth, values in turns.step_s.items()}
        series |= {f"server, switch to {depth} LoRAs, {kind}, s": values for depth, values in turns.switch_s.items()}
    return series
