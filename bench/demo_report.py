"""What the demo found, as a table, a picture and JSON. Owns the form; measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.report import Figure, Report


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: ``pss`` counts shared pages in part, ``uss`` those that it alone has."""

    name: str
    pss: int
    uss: int


@dataclass(frozen=True)
class Comparison:
    """The same processes twice. ``shared`` ends with the host, where there is one.

    Where each process has a LoRA of its own, ``loras`` says what kind of file, ``distinct`` how many outputs differ
    from all others, and ``checksums`` are those of the shared bytes that all processes saw, before and after.
    """

    title: str
    model_nbytes: int
    private: Sequence[Memory]
    shared: Sequence[Memory]
    load_s: Mapping[str, Sequence[float]]
    identical: int
    outputs: int
    loras: Sequence[str] = ()
    distinct: int = 0
    checksums: Sequence[str] = ()

    @property
    def untouched(self) -> bool:
        """Whether every process saw the same shared bytes before and after all of them had used their LoRAs."""
        return len(set(self.checksums)) <= 1

    @property
    def faults(self) -> list[str]:
        """What must never be, and was."""
        alike = self.outputs - self.distinct if self.loras else 0
        found = {
            "outputs differ between shared and private weights": self.identical != self.outputs,
            f"{alike} outputs are alike although each process has a LoRA of its own": alike > 0,
            "the shared bytes changed": not self.untouched,
        }
        return [fault for fault, happened in found.items() if happened]

    @property
    def without(self) -> int:
        return sum(memory.pss for memory in self.private)

    @property
    def with_sharing(self) -> int:
        return sum(memory.pss for memory in self.shared)

    @property
    def saved(self) -> int:
        return self.without - self.with_sharing


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def print_table(comparison: Comparison, console: Console) -> None:
    """Per process, then total and what is saved."""
    table = Table(title=comparison.title, title_justify="left", caption_justify="left")
    table.add_column("process")
    if comparison.loras:
        table.add_column("LoRA\nfile")
    for way in ("without sharing", "with sharing"):
        table.add_column(f"{way}\nPSS", justify="right")
        table.add_column("of it alone\nUSS", justify="right")
    private = {memory.name: memory for memory in comparison.private}
    blank = [""] * bool(comparison.loras)
    for number, shared in enumerate(comparison.shared):
        before = private.get(shared.name)
        cells = (_mb(before.pss), _mb(before.uss)) if before else ("-", "-")
        own = [*comparison.loras, "-"][number : number + 1] if comparison.loras else []
        table.add_row(shared.name, *own, *cells, _mb(shared.pss), _mb(shared.uss))
    table.add_section()
    table.add_row("total", *blank, _mb(comparison.without), "", _mb(comparison.with_sharing), "", style="bold")
    table.add_row("saved", *blank, "", "", _mb(comparison.saved), f"{_percent(comparison)}", style="bold green")
    console.print()
    console.print(table)


def _percent(comparison: Comparison) -> str:
    return f"{100 * comparison.saved / comparison.without:.0f}%"


def draw(comparisons: Sequence[Comparison], out: Path) -> None:
    """Two bars for each comparison: what each process has alone, and on top what they share, once."""
    from matplotlib import colormaps  # noqa: PLC0415 - slow, and the processes to be measured come first
    from matplotlib.figure import Figure as Canvas  # noqa: PLC0415

    canvas = Canvas(figsize=(6.5 * len(comparisons), 5.2), layout="constrained")
    shades = colormaps["Blues"]
    for axis, comparison in zip(canvas.subplots(1, len(comparisons), squeeze=False)[0], comparisons, strict=True):
        for x, memories in enumerate((comparison.private, comparison.shared)):
            bottom = 0.0
            for index, memory in enumerate(memories):
                color = "tab:gray" if memory.name == "host" else shades(0.25 + 0.3 * index / len(memories))
                axis.bar(x, memory.uss / 1e9, bottom=bottom, width=0.6, color=color, edgecolor="white")
                if memory.uss > 0.04 * comparison.without:
                    label = f"{memory.name}  {memory.uss / 1e9:.2f} GB"
                    axis.text(x, bottom + memory.uss / 2e9, label, ha="center", va="center", fontsize=8)
                bottom += memory.uss / 1e9
            total = sum(memory.pss for memory in memories) / 1e9
            axis.bar(x, total - bottom, bottom=bottom, width=0.6, color="tab:orange", edgecolor="white",
                     label="shared pages, counted once" if x else None)  # fmt: skip
            axis.text(x, total, f"{total:.2f} GB", ha="center", va="bottom", fontweight="bold")
        axis.set_xticks([0, 1], ["without sharing", "with lunashm"])
        axis.set_ylabel("memory, GB (sum of PSS)")
        axis.set_ylim(0, 1.15 * max(comparison.without, comparison.with_sharing) / 1e9)
        axis.set_title(f"{comparison.title}\n{_percent(comparison)} saved", fontsize=10)
        axis.legend(loc="upper right", fontsize=8)
    canvas.savefig(out, dpi=130)


def write(comparisons: Sequence[Comparison], out: Path, comfy: Path | None) -> None:
    """The whole result in the form that all benchmarks share."""
    figures, samples = [], {}
    for number, comparison in enumerate(comparisons):
        prefix = "" if number == 0 else "ComfyUI: "
        saved_share = comparison.saved / comparison.without
        figures += [
            Figure(f"{prefix}memory without sharing", comparison.without, "B"),
            Figure(f"{prefix}memory with sharing", comparison.with_sharing, "B"),
            Figure(f"{prefix}saved", saved_share, "share of without"),
            Figure(f"{prefix}outputs that are not identical", comparison.outputs - comparison.identical, "", "<= 0"),
        ]
        if comparison.loras:
            alike = comparison.outputs - comparison.distinct
            figures.append(Figure(f"{prefix}outputs alike, each with a LoRA of its own", alike, "", "<= 0"))
            figures.append(Figure(f"{prefix}shared bytes changed by LoRAs", int(not comparison.untouched), "", "<= 0"))
        for way, memories in (("without", comparison.private), ("with", comparison.shared)):
            samples[f"{prefix}PSS {way} sharing"] = [float(memory.pss) for memory in memories]
            samples[f"{prefix}USS {way} sharing"] = [float(memory.uss) for memory in memories]
        samples |= {f"{prefix}{way}, seconds to weights": list(times) for way, times in comparison.load_s.items()}
    value: dict[str, Any] = Report.of("demo", figures, samples, comfy).as_dict()
    value["comparisons"] = [asdict(comparison) for comparison in comparisons]
    out.write_text(json.dumps(value, indent=2) + "\n")
