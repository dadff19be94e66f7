"""T1: what a Router or a stock loader returns is a real MODEL in the host's memory, and the log says so.

Each load is measured on a server that has loaded this model before and let go of it, with the host still holding it: so
what it takes is what this load takes, not the imports of a first one. On a CPU the client's own memory is followed
every 5 ms, and drawing shows where the weights are read from: pages of the host's memory appear in the client, its own
memory does not grow. On a GPU it is the device's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.acceptance import graphs
from bench.acceptance.findings import Findings
from bench.acceptance.luna_log import LunaLog
from bench.acceptance.memory import Peak, settled
from bench.acceptance.stage import Stage
from bench.comfy_server import ComfyServer
from bench.process_memory import resident
from bench.workflows import Graph, again

GB = 1e9
OWN = "<= 0.1"
"""Of the model's bytes: what a load may take beside them, at its peak. A copy of its weights would be 1."""
READ = ">= 0.7"
"""Of the model's bytes: what drawing has to read from the host's memory. Of the table of tokens, a fifth of the tiny
model, it reads some rows, of the VAE one half."""


@dataclass(frozen=True)
class Load:
    """Bytes over what was in use before. ``read``: of the host's memory, by drawing; ``drawn``: of its own, by it."""

    peak: int
    after: int
    read: int
    drawn: int


def run(stage: Stage, found: Findings) -> None:
    name = stage.models.checkpoint(stage.scale.large)
    picture = stage.picture(name=name)
    stock = _load(stage, stage.stock, graphs.loaded_by_stock(name), graphs.stock(picture))
    log = LunaLog(stage.shared)
    router = _load(stage, stage.shared, graphs.loaded(name), graphs.routed(picture))
    _router_lines(stage, found, log, name)
    log = LunaLog(stage.shared)
    loader = _load(stage, stage.shared, graphs.loaded_by_stock(name), graphs.stock(picture))
    lent = _lent(stage, name)
    said = [line for line in log.attached() if line.name == name]
    found.holds("the stock loader's line names model and size", _near(said[-1].nbytes if said else 0, lent), said[-1:])
    for kind, load in (("Router", router), ("CheckpointLoaderSimple", loader)):
        found.figure(f"{kind}: own memory at the peak of a load, of the model", load.peak / lent, "ratio", OWN)
        if stage.on_cpu:
            found.figure(f"{kind}: own memory after drawing, of the model", load.drawn / lent, "ratio", "<= 0.25")
            found.figure(f"{kind}: read from the host's memory, of the model", load.read / lent, "ratio", READ)
    found.figure("stock: own memory at the peak of a load, of the model", stock.peak / lent, "ratio")
    found.figure("the model", lent / GB, "GB")
    plain = stage.stocks(picture)
    for way, graph in {"Router": graphs.routed(picture), "stock loader": graphs.stock(picture)}.items():
        same = (stage.draw(stage.shared, again(graph, 1)) == plain).all()
        found.holds(f"{way}: the picture is stock's, to the bit", same)
    found.holds("the picture is no flat one", plain.std() > 1)
    ways = _others(stage, found)
    found.line = (
        f"{name}: {lent / GB:.2f} GB from the host by {ways} loaders; at the peak of a load {router.peak / 1e6:.1f} MB "
        f"of its own by the Router, {loader.peak / 1e6:.1f} by the stock loader (stock: {stock.peak / GB:.2f} GB)"
    )


def _router_lines(stage: Stage, found: Findings, log: LunaLog, name: str) -> None:
    lines = [line for line in log.shared() if line.name == name]
    expected = stage.host.endpoint.url
    found.holds("the Router says ✓ for MODEL, CLIP and VAE", {line.what for line in lines} == {"MODEL", "CLIP", "VAE"})
    found.holds("its lines name the mode", {line.mode for line in lines} == {"auto"})
    found.holds("its lines name the host", {line.endpoint for line in lines} == {expected}, expected)
    sizes = {line.what: line.nbytes for line in lines}
    found.holds("its lines' sizes are the model's", _near(sum(sizes.values()), _lent(stage, name)), sizes)
    own = max((line.private_nbytes for line in lines), default=float("nan"))
    found.figure("private bytes that the Router's lines name, at most", own / 1e6, "MB", "<= 64")


def _others(stage: Stage, found: Findings) -> int:
    """The model in three files, by the other stock loaders and by the Router in each mode; returns how many ways."""
    parts, picture = stage.models.parts(), stage.picture(name=stage.models.checkpoint("sd15-tiny"), seed=2)
    plain = stage.stocks(picture)
    modes: Sequence[str | None] = (None, "auto", "force_daemon")
    for mode in modes:
        log = LunaLog(stage.shared)
        same = (stage.draw(stage.shared, graphs.from_parts(parts, picture, mode)) == plain).all()
        way = f"Router, three files, {mode}" if mode else "UNETLoader, CLIPLoader, VAELoader"
        found.holds(f"{way}: the picture is stock's, to the bit", same)
        found.holds(f"{way}: three files are attached", len(log.attached()) == 3, len(log.attached()))
        if mode:
            found.holds(f"{way}: three lines say so", {line.mode for line in log.shared()} == {mode})
    log = LunaLog(stage.shared)
    same = (stage.draw(stage.shared, graphs.routed(picture, "force_local")) == plain).all()
    found.holds("Router, force_local: the picture is stock's, to the bit", same)
    local = log.local()
    quiet = len(local) == 3 and not any(line.warned for line in local) and not log.shared()
    found.holds("Router, force_local: local as wanted, without a warning", quiet, [line.reason for line in local])
    return 2 + len(modes)


def _load(stage: Stage, server: ComfyServer, load: Graph, draw: Graph) -> Load:
    server.render(draw)  # whatever a first time imports or keeps
    server.free()
    own, shared = _own(stage, server), resident(server.pid).shared
    before = settled(own)
    with Peak(own) as peak:
        server.run(again_loaded(load))
    after = settled(own)
    server.render(again(draw, 2))
    return Load(
        peak.highest - before, after - before, resident(server.pid).shared - shared, settled(own) - before,
    )  # fmt: skip


def again_loaded(load: Graph) -> Graph:
    """A load that ComfyUI has no answer for; free() has dropped the model, and this its answer."""
    (shown,) = (node for node, content in load.items() if content["class_type"] == "PreviewAny")
    return load | {shown: {**load[shown], "inputs": load[shown]["inputs"] | {"bench_nonce": 1}}}


def _own(stage: Stage, server: ComfyServer) -> Callable[[], int]:
    """The client's own memory; on a GPU the device's."""
    if not stage.on_cpu:
        return stage.meter.read
    return lambda: resident(server.pid).anonymous


def _lent(stage: Stage, name: str) -> int:
    file = stage.models.path(name).resolve().name
    return stage.lent().get(file, 0)


def _near(said: float, nbytes: int) -> bool:
    """Lines round to two digits behind the point, of GB."""
    return abs(said - nbytes) <= 0.02 * nbytes + 0.015 * GB
