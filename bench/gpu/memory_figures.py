"""What fleets of servers say: memory, marginal memory, throughput, load nodes. Plain functions; measures nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from bench.gpu.memory_fleet import Fleet, Level
from bench.report import Figure, median

GB = 1e9
MARGINAL_GB = "<= 2.2"
FITS_GB = "<= 32"
LOAD_S = "<= 1"
MOST = 8


def figures(fleet: Fleet) -> list[Figure]:
    found: list[Figure] = []
    for count, level in sorted(fleet.levels.items()):
        found += _level(fleet, count, level)
    found += _marginal(fleet)
    if fleet.kind == "shared" and fleet.levels:
        found.append(Figure("shared: the host's weights", fleet.weights / GB, "GB"))
    found += _load_nodes(fleet)
    images = [image for level in fleet.levels.values() for image in level.images]
    if images:
        share = sum(image == images[0] for image in images) / len(images)
        found.append(Figure(f"{fleet.kind}: images byte-identical to the first one's", share, "share", ">= 1"))
    return found


def _level(fleet: Fleet, count: int, level: Level) -> list[Figure]:
    label = f"{fleet.kind}, N={count}"
    target = FITS_GB if fleet.kind == "shared" and count == MOST else None
    return [
        Figure(f"{label}: {fleet.unit}, idle", level.idle / GB, "GB"),
        Figure(f"{label}: {fleet.unit}, attached", level.attached / GB, "GB"),
        Figure(f"{label}: {fleet.unit}, peak, first prompts in turn", level.in_turn / GB, "GB"),
        Figure(f"{label}: {fleet.unit}, peak", level.peak / GB, "GB", target),
        Figure(f"{label}: all rendering at once", level.images_a_minute, "images/min"),
    ]


def _marginal(fleet: Fleet) -> list[Figure]:
    if len(fleet.levels) < 2:
        return []
    least, most = min(fleet.levels), max(fleet.levels)
    low, high = fleet.levels[least], fleet.levels[most]
    extra = most - least
    target = MARGINAL_GB if fleet.kind == "shared" else None
    label = f"{fleet.kind}: each extra instance, N={least} to {most}, {fleet.unit}"
    return [
        Figure(f"{label}, idle", (high.idle - low.idle) / extra / GB, "GB"),
        Figure(f"{label}, attached", (high.attached - low.attached) / extra / GB, "GB"),
        Figure(f"{label}, peak with all rendering", (high.peak - low.peak) / extra / GB, "GB", target),
    ]


def _load_nodes(fleet: Fleet) -> list[Figure]:
    """The first server of a host waits for it to load the file: it is no warm one."""
    took_s = load_nodes(fleet)
    warm = took_s[1:] if fleet.kind == "shared" else took_s
    if not warm:
        return []
    label = "warm host" if fleet.kind == "shared" else "file in the page cache"
    target = LOAD_S if fleet.kind == "shared" else None
    return [Figure(f"{fleet.kind}: load node, {label}, median", median(warm), "s", target)]


def digests(fleet: Fleet) -> list[str]:
    """Of all images, each once: one digest, and the same one in every step, where all are equal."""
    images = {image for level in fleet.levels.values() for image in level.images}
    return sorted(hashlib.sha256(image).hexdigest()[:16] for image in images)


def load_nodes(fleet: Fleet) -> list[float]:
    return [seconds for _, level in sorted(fleet.levels.items()) for seconds in level.load_s]


def samples(fleets: Sequence[Fleet]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for fleet in fleets:
        levels = sorted(fleet.levels.items())
        if not levels:
            continue
        found[f"{fleet.kind}: N"] = [float(count) for count, _ in levels]
        for phase in ("idle", "attached", "in_turn", "peak"):
            found[f"{fleet.kind}: {phase}, GB, by N"] = [getattr(level, phase) / GB for _, level in levels]
        found[f"{fleet.kind}: images/min, by N"] = [level.images_a_minute for _, level in levels]
        found[f"{fleet.kind}: sampling of memory, Hz"] = [level.rate_hz for _, level in levels]
        found[f"{fleet.kind}: load node, s"] = load_nodes(fleet)
    return found
