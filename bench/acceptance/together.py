"""T5: N servers on one host, each with a stack of LoRAs of its own, all at once, against as many stock servers.

Every server first draws its pictures alone, then all draw theirs at the same time; each picture is compared with the
one that the same server made alone, and with stock's. Shared and stock servers take turns in blocks of a few pictures,
so that whatever else the machine does falls on both; memory is looked at before the first block and after every block.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier

from bench.acceptance import graphs
from bench.acceptance.findings import Findings
from bench.acceptance.graphs import Picture
from bench.acceptance.memory import claim_flat, held, in_words
from bench.acceptance.models import stack
from bench.acceptance.pixels import Pixels, levels, within_rounding
from bench.acceptance.stage import KINDS, Stage
from bench.comfy_server import ComfyServer
from bench.gpu import memory_sharing
from bench.report import median
from bench.workflows import Graph, Lora, again

STACKS: tuple[tuple[Lora, ...], ...] = (
    stack(("character", 0.8)),
    stack(("style", 0.9), ("character", -0.5)),
    stack(("light", 1.0, 0.6), ("line", 0.6)),
    stack(("line", 0.7, 0.4), ("style", 0.4), ("light", -0.3)),
)
BLOCK = 5


@dataclass
class Crowd:
    """Servers of one kind, each with its pictures."""

    servers: Sequence[ComfyServer]
    graphs: Sequence[Sequence[Graph]]
    pictures: list[list[Pixels]] = field(default_factory=list)
    took_s: list[float] = field(default_factory=list)

    def alone(self) -> list[list[Pixels]]:
        """One server after the other."""
        pairs = zip(self.servers, self.graphs, strict=True)
        return [[Stage.draw(server, graph) for graph in graphs] for server, graphs in pairs]

    def block(self, first: int) -> None:
        """All at once: as many of each one's pictures, from the given one on; nobody begins before all are ready."""
        ready = Barrier(len(self.servers) + 1)
        if not self.pictures:
            self.pictures = [[] for _ in self.servers]

        def draw(number: int) -> None:
            ready.wait(60)
            for graph in self.graphs[number][first : first + BLOCK]:
                self.pictures[number].append(Stage.draw(self.servers[number], again(graph, 1)))

        with ThreadPoolExecutor(len(self.servers)) as pool:
            running = [pool.submit(draw, number) for number in range(len(self.servers))]
            ready.wait(60)
            began = time.monotonic()
            for one in running:
                one.result()
        drawn = len(self.servers) * len(self.graphs[0][first : first + BLOCK])
        self.took_s.append((time.monotonic() - began) / drawn)


def run(stage: Stage, found: Findings) -> None:
    count, renders = stage.scale.servers, stage.scale.renders
    stacks = STACKS[:count]
    pictures = [[stage.picture(loras, seed) for seed in range(1, renders + 1)] for loras in stacks]
    stage.start(dict.fromkeys(KINDS, count))
    shared = Crowd(stage.servers("shared", count), [[_luna(p) for p in each] for each in pictures])
    stock = Crowd(stage.servers("stock", count), [[graphs.stock(p) for p in each] for each in pictures])
    alone = shared.alone()
    for server, own in zip(stock.servers, stock.graphs, strict=True):
        server.render(again(own[0], 2))
    meter = stage.follow(shared.servers)
    meter.settled()
    looks = [held(meter, stage.host, shared.servers)]
    for number, first in enumerate(range(0, renders, BLOCK)):
        for crowd in (shared, stock) if number % 2 == 0 else (stock, shared):
            crowd.block(first)
        looks.append(held(meter, stage.host, shared.servers))
    _claims(stage, found, shared, stock, alone)
    claim_flat(found, f"{count} x {renders} renders at once", looks, min(BLOCK, renders))
    total, equal = count * renders, _equal(shared.pictures, alone)
    ours, theirs = median(shared.took_s), median(stock.took_s)
    found.figure("a render, shared servers", ours, "s")
    found.figure("a render, stock servers", theirs, "s")
    found.figure("throughput, shared / stock", theirs / ours, "ratio")
    found.series({"a render, shared servers, s": shared.took_s, "a render, stock servers, s": stock.took_s})
    found.line = (
        f"{count} servers x {renders} renders: {equal} of {total} equal to the picture made alone, max "
        f"{_furthest(shared.pictures, stock.pictures)} of 255 from stock; {ours:.2f} s a render, stock {theirs:.2f} "
        f"({theirs / ours:.2f}x); memory: {in_words(looks)}"
    )
    if not stage.scale.short:
        for kind in KINDS:
            stage.keep(kind, 1)


def _luna(picture: Picture) -> Graph:
    return graphs.luna(picture, stacked=True)


def _claims(stage: Stage, found: Findings, shared: Crowd, stock: Crowd, alone: list[list[Pixels]]) -> None:
    total = sum(map(len, alone))
    equal = _equal(shared.pictures, alone)
    found.holds("every picture is the one made alone, to the bit", equal == total, f"{equal} of {total}")
    close = sum(
        within_rounding(ours, theirs, stage.on_cpu)
        for mine, others in zip(shared.pictures, stock.pictures, strict=True)
        for ours, theirs in zip(mine, others, strict=True)
    )
    found.holds("every picture is stock's within rounding", close == total, f"{close} of {total}")
    first = {each[0].tobytes() for each in alone}
    found.holds("every stack makes a picture of its own", len(first) == len(alone), f"{len(first)} different ones")
    found.holds("every seed, too", len({picture.tobytes() for each in alone for picture in each}) == total)
    holds = memory_sharing.held(stage.host)
    least = min(holds.get(server.pid, 0) for server in shared.servers)
    weights = stage.models.path(stage.models.name).stat().st_size
    found.holds("all of them draw with the host's bytes", least > 0.5 * weights, f"{least / 1e9:.2f} GB at least")


def _equal(ours: list[list[Pixels]], theirs: list[list[Pixels]]) -> int:
    pairs = zip(ours, theirs, strict=True)
    return sum(bool((a == b).all()) for mine, others in pairs for a, b in zip(mine, others, strict=True))


def _furthest(ours: list[list[Pixels]], theirs: list[list[Pixels]]) -> int:
    pairs = zip(ours, theirs, strict=True)
    return max(levels(a, b) for mine, others in pairs for a, b in zip(mine, others, strict=True))
