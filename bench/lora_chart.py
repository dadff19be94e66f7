"""The picture of bench.lora: for each architecture overhead against the number of LoRAs, and the switch times."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from bench.lora_figures import PERCENT, Measured, counted
from bench.report import Report, median, spread

WAYS = {
    "ours": ("ours", "#2a7f62"),
    "merge": ("stock merge", "#b0b0b0"),
    "bypass": ("stock bypass", "#c8553d"),
}


def draw(found: Sequence[Measured], report: Report, out: Path) -> None:
    """Raises ImportError without matplotlib."""
    matplotlib = importlib.import_module("matplotlib.figure")
    canvas = matplotlib.Figure(figsize=(10, 0.6 + 3.6 * len(found)), layout="constrained")
    canvas.suptitle(f"LoRAs of rank {found[0].rank}; {report.hardware['cpu']}, {report.hardware['cores']} cores")
    rows = canvas.subplots(len(found), 2, squeeze=False, width_ratios=(3, 2))
    for (steps, switches), measured in zip(rows, found, strict=True):
        _overheads(steps, measured)
        _switches(switches, measured)
        for axis in (steps, switches):
            axis.spines[["top", "right"]].set_visible(False)
    rows[0][0].legend(frameon=False)
    canvas.savefig(out, dpi=120)


def _overheads(axis, measured: Measured) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Medians, with bars from quartile to quartile; no LoRA is the zero line."""
    depths = measured.depths
    axis.axhline(0, color="black", linewidth=1, label="no LoRA")
    for way, (label, color) in WAYS.items():
        spreads = [spread([pair.overhead * PERCENT for pair in counted(measured.of(way, depth))]) for depth in depths]
        bars = [[s.median - s.q1 for s in spreads], [s.q3 - s.median for s in spreads]]
        axis.errorbar(depths, [s.median for s in spreads], bars, label=label, color=color, marker="o", capsize=3)
    floors = [measured.floor(depth) * PERCENT for depth in depths]
    axis.plot(depths, floors, ":", color="black", label="arithmetic floor")
    axis.set_xticks(depths)
    axis.set_xlabel("LoRAs")
    axis.set_ylabel("a step takes longer by, %")
    axis.set_title(measured.arch)


def _switches(axis, measured: Measured) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Until ready to run, and on top what the first step takes longer than the next."""
    own = {way: counted([switch for switch in measured.switches if switch.way == way]) for way in WAYS}
    ready = [median([switch.ready_s for switch in own[way]]) for way in WAYS]
    late = [max(0.0, median([switch.first_step_s - switch.next_step_s for switch in own[way]])) for way in WAYS]
    labels, colors = zip(*WAYS.values(), strict=True)
    axis.bar(labels, ready, color=colors)
    top = axis.bar(labels, late, bottom=ready, fill=False, linestyle=":", label="more in the first step")
    axis.bar_label(top, [f"{seconds:.3g} s" for seconds in ready], fontsize=8, padding=2)
    axis.set_ylim(top=1.25 * max(a + b for a, b in zip(ready, late, strict=True)))  # room for the legend
    axis.set_ylabel("switch from 2 LoRAs to 2 others, s")
    axis.set_title(measured.arch)
    axis.legend(frameon=False, loc="upper right")
