"""One shared server for each of ComfyUI's memory flags, against a stock one with the same flags.

For each: whether it shares (and the reason where it does not), whether its image is stock's, and what it adds to the
device's memory by rendering. All servers are started at once and render one after the other, each alone; the default
flags come first, so that the host is warm for all others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

from bench.comfy_server import ComfyError, ComfyServer
from bench.gpu import memory_sharing, sdxl
from bench.gpu.device_memory import Meter, Watch, meter_of
from bench.gpu.memory_start import started
from bench.gpu.part import Context, Measured
from bench.report import Figure
from bench.workflows import Graph

GB = 1e9
KINDS = ("stock", "shared")
DEFAULT: tuple[str, ...] = ()
FLAGS: tuple[tuple[str, ...], ...] = (
    DEFAULT, ("--highvram",), ("--gpu-only",), ("--lowvram",), ("--novram",), ("--disable-dynamic-vram",),
    ("--disable-cuda-malloc",),
)  # fmt: skip
DRY_FLAGS: tuple[tuple[str, ...], ...] = (("--disable-dynamic-vram",),)
"""The one that goes together with --cpu."""
PROMPT_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class Render:
    """What one server did. ``added``, ``peak``: bytes over what was in use just before its prompt."""

    kind: str
    flags: tuple[str, ...]
    image: bytes | None
    added: int
    peak: int
    said: str

    @property
    def label(self) -> str:
        return f"{' '.join(self.flags) or 'default flags'}, {self.kind}"


def run(context: Context) -> Measured:
    work = sdxl.workload(context)
    graph = sdxl.graph(context, sdxl.size_of(context).short)
    meter, renders, notes = meter_of(context), [], list[str]()
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(work.host(sdxl.device_of(context), mode="auto"))
        every = [(kind, flags) for flags in (DRY_FLAGS if context.dry else FLAGS) for kind in KINDS]
        servers = [work.server(host if kind == "shared" else None, flags) for kind, flags in every]
        up = _up(stack, servers, notes)
        meter.follow([server.pid for server in up], host.pid)
        for (kind, flags), server in zip(every, servers, strict=True):
            if server not in up:
                continue
            try:
                renders.append(_render(kind, flags, server, graph, meter))
            except ComfyError as exc:
                notes.append(f"{' '.join(flags)}, {kind}: {str(exc)[:1000]}\n{sdxl.log_tail(server)}")
            up.remove(server)
            meter.follow([each.pid for each in up], host.pid)
            server.stop()
        weights = memory_sharing.shared_nbytes(host)
    return Measured(_figures(renders, weights), {}, {one.label: one.said for one in renders if one.said}, notes)


def _up(stack: contextlib.ExitStack, servers: Sequence[ComfyServer], notes: list[str]) -> list[ComfyServer]:
    """Those that came up; a flag that this ComfyUI does not know ends one, and no other."""
    try:
        return started(stack, servers)
    except ComfyError as exc:
        notes.append(str(exc)[:2000])
        return [server for server in servers if server.alive]


def _render(kind: str, flags: tuple[str, ...], server: ComfyServer, graph: Graph, meter: Meter) -> Render:
    before = meter.settled(5.0)
    with Watch(meter) as watch:
        image = server.render(graph, PROMPT_TIMEOUT_S)
    after = meter.settled(5.0)
    said = "; ".join(memory_sharing.said(server)[-2:])
    return Render(kind, flags, image, after - before, max(watch.peak, after) - before, said)


def _figures(renders: Sequence[Render], weights: int) -> list[Figure]:
    found = []
    images = {(one.kind, one.flags): one.image for one in renders}
    first = next((one for one in renders if one.kind == "shared"), None)
    for one in renders:
        host_nbytes = weights if one is first else 0  # its prompt had the host load
        found.append(Figure(f"{one.label}: memory added by a render", (one.added - host_nbytes) / GB, "GB"))
        found.append(Figure(f"{one.label}: memory added at the peak", (one.peak - host_nbytes) / GB, "GB"))
        if one.kind == "shared":
            shares = "attached" in one.said and "loaded locally" not in one.said
            stock = images.get(("stock", one.flags))
            same = float("nan") if stock is None else float(stock == one.image)
            found.append(Figure(f"{one.label}: shares", float(shares), "share"))
            found.append(Figure(f"{one.label}: image byte-identical to stock's", same, "share", ">= 1"))
    return found
