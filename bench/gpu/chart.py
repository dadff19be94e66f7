"""A picture of each part: its figures as bars, one axis for each unit, targets as lines. None without matplotlib.

In a dry run the bars are numbers of samples, and the picture says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.part import Part
from bench.gpu.record import OK, Place

Bars = dict[str, list[tuple[str, float, float | None]]]
"""Unit -> figures of it: name, value, target."""


def draw(out: Path, parts: Sequence[Part], dry: bool) -> list[str]:
    """``partN.png`` for each part with something to draw; returns what was not drawn, and why."""
    try:
        matplotlib = importlib.import_module("matplotlib.figure")
    except ImportError:
        return ["matplotlib is not installed: no pictures; `python -m bench.gpu` draws them anew where it is."]
    for part in parts:
        bars = _bars(out, part, dry)
        if bars:
            _draw(matplotlib, bars, out / f"part{part.number}.png", f"{part.title}" + (" - DRY RUN" if dry else ""))
    return []


def _bars(out: Path, part: Part, dry: bool) -> Bars:
    found: Bars = {}
    for step in part.steps:
        record = Place(out, part.number, step.name, dry, "").read()
        if record is None or record["status"] != OK:
            continue
        if dry:
            samples = sum(map(len, record["samples"].values()))
            found.setdefault("samples (DRY RUN)", []).append((step.name, samples, None))
            continue
        for figure in record["figures"]:
            if figure["value"] is not None:
                bar = (figure["figure"], figure["value"], _bound(figure["target"]))
                found.setdefault(figure["unit"], []).append(bar)
    return found


def _bound(target: str | None) -> float | None:
    return None if target is None else float(target.lstrip("<>= "))


def _draw(matplotlib: Any, bars: Bars, out: Path, title: str) -> None:  # noqa: ANN401 - imported where it is
    heights = [0.6 + 0.28 * len(group) for group in bars.values()]
    canvas = matplotlib.Figure(figsize=(11, 0.8 + sum(heights)), layout="constrained")
    canvas.suptitle(title)
    axes = canvas.subplots(len(bars), squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (unit, group) in zip(axes, bars.items(), strict=True):
        places = range(len(group))
        axis.barh(places, [value for _, value, _ in group], color="#4878a8")
        axis.set_yticks(places, [name for name, _, _ in group], fontsize=7)
        axis.invert_yaxis()
        axis.set_xlabel(unit)
        for place, (_, _, bound) in zip(places, group, strict=True):
            if bound is not None:
                axis.plot([bound, bound], [place - 0.4, place + 0.4], color="#c03030", linewidth=2)
    canvas.savefig(out, dpi=120)
