"""Weights in RAM for ComfyUI on a GPU: a host on CPU memory, two servers that render from it.

Each moves what it runs to the GPU, as stock does from its own copy; what is shared is the copy in RAM. So two figures:
the sum of PSS, where the weights should count once, and the device's memory, which should be stock's.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

from bench.comfy_server import ComfyServer
from bench.gpu import memory_sharing, sdxl
from bench.gpu.device_memory import Meter, Watch, meter_of
from bench.gpu.memory_start import started
from bench.gpu.part import Context, Measured
from bench.host import HostProcess
from bench.memory_watch import settled
from bench.report import Figure
from bench.workload import Workload

GB = 1e9
COUNT = 2
KINDS = ("stock", "shared")


@dataclass(frozen=True)
class Held:
    """Bytes that two servers (and the host of shared ones) added by rendering."""

    pss: int
    device: int
    peak: int
    images: tuple[bytes, ...]
    said: str


def run(context: Context) -> Measured:
    work = sdxl.workload(context)
    meter = meter_of(context)
    notes: list[str] = []
    found: dict[str, Held] = {}
    for kind in KINDS[1:] if context.dry else KINDS:
        try:
            found[kind] = _held(kind, work, meter)
        except memory_sharing.NotShared as exc:
            notes.append(f"weights in RAM are not shared with ComfyUI on this device: {exc}")
    facts = {f"{kind}: what the extension said": held.said for kind, held in found.items() if held.said}
    return Measured(figures(found, work.nbytes), {}, facts, notes)


def _held(kind: str, work: Workload, meter: Meter) -> Held:
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(work.host("cpu", mode="auto")) if kind == "shared" else None
        servers = started(stack, [work.server(host) for _ in range(COUNT)])
        pids, host_pid = [server.pid for server in servers], host.pid if host else None
        meter.follow(pids, host_pid)
        before, pss = meter.settled(), settled(pids, host_pid).total
        with Watch(meter) as watch:
            images = tuple(server.render(work.graph) for server in servers)
        after = meter.settled()
        _check(host, servers, work)
        added = settled(pids, host_pid).total - pss
        said = "; ".join(memory_sharing.said(servers[-1])[-2:])
        return Held(added, after - before, max(watch.peak, after) - before, images, said)


def _check(host: HostProcess | None, servers: list[ComfyServer], work: Workload) -> None:
    if host is not None:
        memory_sharing.check(host, servers, work.nbytes)


def figures(found: dict[str, Held], nbytes: int) -> list[Figure]:
    """`nbytes`: of the checkpoint. What of a copy is on the device need not stay in RAM, so stock may be below two."""
    series = []
    for kind, held in found.items():
        label = f"weights in RAM, {COUNT} servers, {kind}"
        series += [
            Figure(f"{label}: PSS added by rendering", held.pss / GB, "GB"),
            Figure(f"{label}: the same / the file", held.pss / nbytes, "copies"),
            Figure(f"{label}: device memory added by rendering", held.device / GB, "GB"),
            Figure(f"{label}: device memory added at the peak", held.peak / GB, "GB"),
        ]
    if len(found) == len(KINDS):
        stock = found["stock"].images
        same = sum(image == stock[0] for image in found["shared"].images) / COUNT
        series.append(Figure("weights in RAM: images byte-identical to stock's", same, "share", ">= 1"))
    return series
