"""T2: N servers, stock against shared: what they hold idle, attached and at the peak, and what one more adds.

Measured by bench.gpu.memory_fleet: device-wide by NVML on a GPU, else the sum of PSS. The full form starts a server
when its turn comes, and each kind runs alone; the short form starts all at once, and keeps them for the tests that
follow.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence

from bench.acceptance.findings import Findings
from bench.acceptance.stage import KINDS, Stage
from bench.comfy_server import ComfyServer
from bench.gpu import memory_figures, memory_fleet
from bench.gpu.memory_fleet import Fleet, Means
from bench.host import HostProcess
from bench.process_memory import tree_memory
from bench.workflows import again

GB, MB = 1e9, 1e6
STEPS = 5
SAVED = ">= 0.8"
"""Of the weights: what a further shared server adds less than a further stock one, which has a copy of its own."""
ONCE = "<= 1.5"
"""How often the device holds the weights for all shared servers, if these need beside them what stock ones do."""
FLAT_MB = 16
"""A server, over five renders, which make nothing that stays."""


def run(stage: Stage, found: Findings) -> None:
    counts, fleets, looks = stage.scale.counts, dict[str, Fleet](), list[float]()
    if stage.scale.short:
        stage.start(dict.fromkeys(KINDS, max(counts)))  # at once, where time is short
    for kind in KINDS:
        if not stage.scale.short:
            for each in KINDS:
                stage.keep(each, 0)
        stage.meter.follow([], None)
        with contextlib.ExitStack() as stack:
            fleets[kind] = memory_fleet.levels(kind, counts, _means(stage, kind), stack)
    if max(counts) in fleets["shared"].levels:
        looks = _steps(stage, max(counts))
    host = _beside_weights(stage)
    if not stage.scale.short:
        stage.keep("shared", 1)
    _claims(stage, found, fleets, looks, host)


def _means(stage: Stage, kind: str) -> Means:
    taken = 0

    def start(_: HostProcess | None, number: int) -> Sequence[ComfyServer]:
        nonlocal taken
        taken += number
        return stage.servers(kind, taken)[-number:]

    return Means(stage.workload, stage.meter, start, (lambda: stage.host) if kind == "shared" else None, lambda _: 1)


def _steps(stage: Stage, count: int) -> list[float]:
    """The device's memory, in MB, after each of some renders by every server."""
    servers = stage.servers("shared", count)
    meter, looks = stage.follow(servers), []
    for step in range(STEPS):
        for server in servers:
            server.render(again(stage.workload.graph, 100 + step))
        looks.append(meter.settled() / MB)
    return looks


def _beside_weights(stage: Stage) -> int:
    """Bytes of the host's process: once it has converted a model, torch is in it. None of it is the device's, if that
    is a GPU.
    """
    if not stage.on_cpu:
        return 0
    memory = tree_memory(stage.host.pid)
    return memory["pss"] - memory["shmem"]


def _claims(stage: Stage, found: Findings, fleets: dict[str, Fleet], looks: list[float], host: int) -> None:
    counts = stage.scale.counts
    most = max(counts)
    for fleet in fleets.values():
        found.notes += fleet.notes
        found.figures += [
            dataclasses.replace(figure, figure=f"T2: {figure.figure}", target=None)
            for figure in memory_figures.figures(fleet)
        ]
    found.series(memory_figures.samples(list(fleets.values())))
    shared, stock = fleets["shared"], fleets["stock"]
    found.holds("shared servers ran at every N", set(shared.levels) == set(counts), shared.notes)
    room = [note for note in stock.notes if "was left out" in note]
    found.holds("stock servers ran at every N that fits", set(stock.levels) == set(counts) or bool(room), stock.notes)
    images = {image for fleet in fleets.values() for level in fleet.levels.values() for image in level.images}
    found.holds("all draw the same picture, to the bit", len(images) == 1, f"{len(images)} different ones")
    extra = {kind: _extra(fleet) for kind, fleet in fleets.items()}
    for kind in KINDS:
        found.figure(f"each further {kind} server, beyond an idle ComfyUI", extra[kind] / GB, "GB")
    weights = max(shared.weights, 1)
    found.figure("saved by each further shared server, of the weights", (extra["stock"] - extra["shared"]) / weights,
                 "ratio", SAVED)  # fmt: skip
    beside = extra["stock"] - weights
    held = _attached(shared, most) - _idle(shared, most) - most * beside - host
    found.figure("the host's process beside the weights", host / GB, "GB")
    found.figure(f"the weights in {most} shared servers and the host, in copies", held / weights, "copies", ONCE)
    if len(looks) == STEPS:
        grew = max(looks) - looks[0]
        found.figure(f"growth over {STEPS} renders, a server", grew / most, "MB", f"<= {FLAT_MB}")
    else:
        found.holds(f"memory was looked at over {STEPS} renders", False)
    found.series({"memory over further renders, MB": looks})
    both = max(set(stock.levels) & set(shared.levels), default=0)
    if _attached(stock, both):
        ours, theirs = _attached(shared, both), _attached(stock, both)
        found.line = (
            f"N={','.join(map(str, counts))}: {both} stock servers hold {theirs / GB:.2f} GB, shared {ours / GB:.2f} "
            f"({ours / theirs:.2f}; at the peak {shared.levels[both].peak / stock.levels[both].peak:.2f}); each "
            f"further one adds {extra['stock'] / GB:.2f} GB stock, {extra['shared'] / GB:.2f} shared to an idle ComfyUI"
            + "".join(f"; {note}" for note in room)
        )


def _extra(fleet: Fleet) -> float:
    """Bytes that a further server adds by what it loads and draws."""
    if len(fleet.levels) < 2:
        return float("nan")
    least, most = min(fleet.levels), max(fleet.levels)
    grown = (_attached(fleet, most) - _idle(fleet, most)) - (_attached(fleet, least) - _idle(fleet, least))
    return grown / (most - least)


def _attached(fleet: Fleet, count: int) -> int:
    return fleet.levels[count].attached if count in fleet.levels else 0


def _idle(fleet: Fleet, count: int) -> int:
    return fleet.levels[count].idle if count in fleet.levels else 0
