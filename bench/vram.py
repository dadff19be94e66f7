"""Memory of N real ComfyUI servers, stock against shared, in one run: idle, attached and at the peak.

Each group is N fresh servers (and, for shared, a fresh host). They render one after the other, all alive, so that the
last one's peak comes on top of what the others hold. idle: before any prompt. attached: after the first prompt of
each, settled. peak: the highest sum while the prompts ran. What is summed: bench.memory_watch.

    python -m bench.vram --servers 1,2,4 --arch sd15 --dtype fp32

A group of stock servers that would not fit into free memory is left out; the report says which and why.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from dataclasses import dataclass, field

from bench import workload
from bench.memory_watch import MemoryWatch, Usage, settled
from bench.report import Figure, Report, add_arguments, emit
from bench.vram_chart import draw
from bench.workload import Workload
from lunashm.memory import ram

MARGIN_NBYTES = 1 << 30
GB = 1e9


@dataclass(frozen=True)
class Group:
    """What N servers of one kind held, and made."""

    kind: str
    count: int
    idle: Usage
    attached: Usage
    peak: int
    watch: MemoryWatch
    first_prompt_s: tuple[float, ...]
    images: tuple[bytes, ...]


@dataclass
class Result:
    """All groups that ran, by (kind, N), and why others did not."""

    groups: dict[tuple[str, int], Group] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def total(self, kind: str, count: int, phase: str) -> float:
        """Bytes; NaN where that group did not run."""
        group = self.groups.get((kind, count))
        if group is None:
            return float("nan")
        return group.peak if phase == "peak" else (group.idle if phase == "idle" else group.attached).total


def measure(kind: str, count: int, work: Workload) -> Group:
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(work.host()) if kind == "shared" else None
        host_pid = host.pid if host else None
        servers = [stack.enter_context(work.server(host)) for _ in range(count)]
        pids = [server.pid for server in servers]
        idle = settled(pids, host_pid)
        work.warm()
        took_s, images = [], []
        with MemoryWatch(pids, host_pid) as watch:
            for server in servers:
                began = time.monotonic()
                images.append(server.render(work.graph))
                took_s.append(time.monotonic() - began)
        attached = settled(pids, host_pid)
        peak = max(watch.peak, attached.total)
        return Group(kind, count, idle, attached, peak, watch, tuple(took_s), tuple(images))


def needed(count: int, work: Workload, result: Result) -> float:
    """Bytes that a stock group will take, from what one server took; a guess from the file's size before that.

    The peak is not what counts: on top of the private copy it has pages of the mapped file, which can be given back.
    """
    one = result.groups.get(("stock", 1))
    each = one.attached.total if one else MARGIN_NBYTES + work.nbytes
    return MARGIN_NBYTES + count * each


def run(counts: list[int], work: Workload) -> Result:
    result = Result()
    for count in counts:
        need, free = needed(count, work, result), ram.available()
        if need > free:
            result.notes.append(
                f"stock N={count} was left out: it needs about {need / GB:.1f} GB, {free / GB:.1f} GB are free"
            )
            print(result.notes[-1], file=sys.stderr)
        kinds = ["stock", "shared"] if need <= free else ["shared"]
        for kind in kinds:
            group = result.groups[kind, count] = measure(kind, count, work)
            print(
                f"{kind} N={count}: idle {group.idle.total / GB:.2f}, attached {group.attached.total / GB:.2f}, "
                f"peak {group.peak / GB:.2f} GB",
                file=sys.stderr,
            )
    return result


def figures(result: Result, counts: list[int]) -> list[Figure]:
    most, least = max(counts), min(counts)
    found = []
    for count in counts:
        stock, shared = (result.total(kind, count, "attached") for kind in ("stock", "shared"))
        target = "<= 0.5" if count == most and most >= 4 else None
        found.append(Figure(f"sum of PSS, N={count}, stock", stock / GB, "GB"))
        found.append(Figure(f"sum of PSS, N={count}, shared", shared / GB, "GB"))
        found.append(Figure(f"sum of PSS, N={count}, shared / stock", shared / stock, "ratio", target))
    for kind in ("stock", "shared") if most > least else ():
        added = _marginal(result, kind, "attached", least, most) - _marginal(result, kind, "idle", least, most)
        target = "<= 0.6" if kind == "shared" else None
        found.append(Figure(f"each extra client over an idle ComfyUI, {kind}", added / GB, "GB", target))
    for count in counts:
        ratio = result.total("shared", count, "peak") / result.total("stock", count, "peak")
        found.append(Figure(f"peak sum of PSS, N={count}, shared / stock", ratio, "ratio"))
    shared_group = result.groups["shared", most]
    found.append(Figure("host's process alone", shared_group.attached.host / GB, "GB"))
    found.append(Figure("host's shared memory", shared_group.attached.segments / GB, "GB"))
    found.append(_identical(result))
    return found


def _marginal(result: Result, kind: str, phase: str, least: int, most: int) -> float:
    """Bytes that each server beyond the first group's adds to the sum."""
    grown = result.total(kind, most, phase) - result.total(kind, least, phase)
    return grown / (most - least)


def _identical(result: Result) -> Figure:
    """Whole PNG files, every server's, against the first stock server's."""
    everyone = [image for group in result.groups.values() for image in group.images]
    stock = next((group.images[0] for group in result.groups.values() if group.kind == "stock"), None)
    share = sum(image == stock for image in everyone) / len(everyone) if stock else float("nan")
    return Figure("images byte-identical to stock's", share, "share", ">= 1")


def samples(result: Result) -> dict[str, list[float]]:
    """Raw numbers of every group; sums are those of bench.memory_watch, `private` is over idle, one a server."""
    found: dict[str, list[float]] = {}
    for (kind, count), group in result.groups.items():
        name = f"{kind} N={count}"
        for phase in ("idle", "attached", "peak"):
            found[f"{name} {phase}, GB"] = [_gb(result.total(kind, count, phase))]
        found[f"{name} during prompts, GB"] = [_gb(sample.total) for sample in group.watch.samples]
        found[f"{name} idle, GB a server"] = [_gb(nbytes) for nbytes in group.idle.servers]
        found[f"{name} attached, GB a server"] = [_gb(nbytes) for nbytes in group.attached.servers]
        added = zip(group.attached.private, group.idle.private, strict=True)
        found[f"{name} private, GB a server"] = [_gb(after - before) for after, before in added]
        if kind == "shared":
            found[f"{name} host, GB"] = [_gb(group.attached.host)]
            found[f"{name} unmapped, GB"] = [_gb(group.attached.unmapped)]
        found[f"{name} first prompt, s"] = [round(took_s, 3) for took_s in group.first_prompt_s]
        found[f"{name} sampling, Hz"] = [round(group.watch.rate_hz, 2)]
    return found


def _gb(nbytes: float) -> float:
    return round(nbytes / GB, 4)


def _counts(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.vram", description=about)
    parser.add_argument("--servers", type=_counts, default=[1, 2, 4], metavar="N,N", help="default: 1,2,4")
    workload.add_arguments(parser, arch="sd15", dtype="fp32")
    add_arguments(parser)
    args = parser.parse_args(argv)
    work = workload.from_arguments(args)
    result = run(args.servers, work)
    title = f"{work.file.name} ({work.nbytes / GB:.2f} GB) in N ComfyUI servers"
    totals = {
        (kind, count, phase): result.total(kind, count, phase)
        for kind, count in result.groups
        for phase in ("idle", "attached", "peak")
    }
    report = Report.of(
        "vram", figures(result, args.servers), samples(result), comfy=work.comfy, notes=result.notes
    )  # fmt: skip
    return 0 if emit(report, args.json, args.save, functools.partial(draw, title, totals)) else 1


if __name__ == "__main__":
    sys.exit(main())
