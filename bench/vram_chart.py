"""The picture of bench.vram: stock against shared bars for each N, one panel a phase."""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from pathlib import Path

from bench.report import Report

PHASES = ("idle", "attached", "peak")
COLORS = {"stock": "#b0b0b0", "shared": "#2a7f62"}
GB = 1e9


def draw(title: str, totals: Mapping[tuple[str, int, str], float], report: Report, out: Path) -> None:
    """`totals`: bytes by (kind, N, phase). Raises ImportError without matplotlib."""
    matplotlib = importlib.import_module("matplotlib.figure")
    counts = sorted({count for _, count, _ in totals})
    canvas = matplotlib.Figure(figsize=(10, 4.2), layout="constrained")
    canvas.suptitle(f"{title}; {report.hardware['cpu']}, {report.hardware['cores']} cores")
    panels = canvas.subplots(1, len(PHASES), sharey=True)
    for axis, phase in zip(panels, PHASES, strict=True):
        for side, kind in enumerate(COLORS):
            values = [totals.get((kind, count, phase), math.nan) / GB for count in counts]
            places = [index + (side - 0.5) * 0.4 for index in range(len(counts))]
            bars = axis.bar(places, [0 if math.isnan(v) else v for v in values], 0.38, label=kind, color=COLORS[kind])
            axis.bar_label(bars, ["left out" if math.isnan(v) else f"{v:.1f}" for v in values], fontsize=8, padding=2)
        axis.set_xticks(range(len(counts)), [f"N={count}" for count in counts])
        axis.set_title(phase)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("sum of PSS and unmapped shared memory, GB")
    panels[0].legend(frameon=False, loc="upper left")
    canvas.savefig(out, dpi=120)
