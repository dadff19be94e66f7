"""The common form of every benchmark's result: figures against targets, raw samples, where they were taken.

Owns the form, the statistics and the printing; measures nothing. A script ends with

    report = Report.of("attach", figures, samples, comfy=comfy)
    sys.exit(0 if emit(report, args.json, args.save) else 1)
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.table import Table

Samples = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Figure:
    """One number that a benchmark answers with, and what was asked of it.

    `target` reads "<= 1.5" or ">= 2" in the figure's own unit; without one there is nothing to meet.
    """

    figure: str
    value: float
    unit: str
    target: str | None = None
    met: bool | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "met", self._meets())

    def _meets(self) -> bool | None:
        if self.target is None:
            return None
        parts = re.fullmatch(r"(<=|>=)\s*(\S+)", self.target)
        if parts is None:
            raise ValueError(f"target {self.target!r} of {self.figure!r}: write '<= NUMBER' or '>= NUMBER'")
        bound = float(parts[2])
        return self.value <= bound if parts[1] == "<=" else self.value >= bound


@dataclass(frozen=True)
class Spread:
    """Where samples lie; quartiles by linear interpolation, ends included."""

    n: int
    min: float
    q1: float
    median: float
    q3: float
    max: float


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def spread(samples: Sequence[float]) -> Spread:
    """Of at least one sample; of exactly one, everything is that sample."""
    values = list(samples) if len(samples) > 1 else [*samples] * 2
    q1, middle, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(len(samples), min(values), q1, middle, q3, max(values))


@dataclass(frozen=True)
class Report:
    """A benchmark's result with all that is needed to judge and repeat it."""

    benchmark: str
    hardware: Mapping[str, Any]
    versions: Mapping[str, str]
    command: str
    date: str
    samples: Samples
    figures: Sequence[Figure]
    notes: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        benchmark: str,
        figures: Sequence[Figure],
        samples: Samples,
        comfy: str | Path | None = None,
        notes: Sequence[str] = (),
    ) -> Self:
        """A report of this machine, this process's command line and this moment; `notes`: what a reader must know."""
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        command = shlex.join(["python", *sys.orig_argv[1:]])
        return cls(benchmark, hardware(), versions(comfy), command, date, samples, figures, notes)

    @property
    def met(self) -> bool:
        """Whether every figure that has a target meets it."""
        return all(figure.met is not False for figure in self.figures)

    def as_dict(self) -> dict[str, Any]:
        """Everything, and the spread of every series of samples; numbers that JSON lacks become null."""
        spreads = {name: dataclasses.asdict(spread(series)) for name, series in self.samples.items() if series}
        whole = {**dataclasses.asdict(self), "spread": spreads, "met": self.met}
        return {key: finite(value) for key, value in whole.items()}


def finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- where it ran ---------------------------------------------------------------------------------


def hardware() -> dict[str, Any]:
    """CPU, memory, kernel and GPUs of this machine, and how busy it is; sizes in bytes."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    shm = os.statvfs("/dev/shm")
    return {
        "cpu": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "ram": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": platform.release(),
        "dev_shm": shm.f_blocks * shm.f_frsize,
        "gpus": _gpus(),
        "load_1m": os.getloadavg()[0],
    }


def _gpus() -> list[str]:
    """Name, memory and driver of each GPU, by nvidia-smi: torch would take GPU memory in this process."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    return answer.stdout.strip().splitlines() if answer.returncode == 0 else []


def versions(comfy: str | Path | None = None) -> dict[str, str]:
    """Python, the packages that matter, and the ComfyUI checkout where one is given."""
    found = {"python": platform.python_version()}
    for package in ("torch", "safetensors", "lunashm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    if comfy is not None:
        text = (Path(comfy).expanduser() / "comfyui_version.py").read_text()
        version = re.search(r'__version__\s*=\s*"([^"]+)"', text)
        found["comfyui"] = version[1] if version else "unknown"
    return found


# --- how it is shown ------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all benchmarks share: --json and --save."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--save", type=Path, metavar="DIR", help="also write the report (JSON, PNG) to DIR")


def emit(
    report: Report,
    as_json: bool = False,
    save_dir: str | Path | None = None,
    draw: Callable[[Report, Path], None] | None = None,
) -> bool:
    """Print the report, write it to `save_dir` where given; returns whether all targets are met.

    `draw` makes the PNG (default: every series of samples); a missing matplotlib is its ImportError.
    """
    text = lists_on_one_line(json.dumps(report.as_dict(), indent=2))
    if as_json:
        print(text)
    else:
        _print_table(report)
    if save_dir is not None:
        folder = Path(save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{report.benchmark}-{re.sub('[^0-9T]', '', report.date.partition('+')[0])}"
        (folder / f"{stem}.json").write_text(text + "\n")
        try:
            (draw or _plot)(report, folder / f"{stem}.png")
        except ImportError:
            print("matplotlib is not installed: no PNG written", file=sys.stderr)
    return report.met


def lists_on_one_line(text: str) -> str:
    """JSON whose lists of plain values take one line each, so that a person can read the rest."""
    return re.sub(r"\[\n[^\[\]{}]*\n\s*\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)


def _print_table(report: Report) -> None:
    table = Table("figure", "value", "unit", "target", "met", title=f"{report.benchmark}  {report.date}")
    for f in report.figures:
        verdict = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[f.met]
        table.add_row(f.figure, f"{f.value:.4g}", f.unit, f.target or "", verdict)
    series = Table("samples", "n", "min", "q1", "median", "q3", "max")
    for name, values in report.samples.items():
        if values:
            n, *rest = dataclasses.astuple(spread(values))
            series.add_row(name, str(n), *(f"{value:.4g}" for value in rest))
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table, series)
    places = {**report.hardware, **report.versions, "command": report.command}
    lines = [f"{key}: {value}" for key, value in places.items()] + [f"note: {note}" for note in report.notes]
    console.print("\n".join(lines), markup=False, highlight=False)


def _plot(report: Report, out: Path) -> None:
    """Every series of samples as points with its median, one axis each."""
    matplotlib = importlib.import_module("matplotlib.figure")
    drawn = {name: values for name, values in report.samples.items() if values}
    if not drawn:
        return
    canvas = matplotlib.Figure(figsize=(8, 0.8 + 0.9 * len(drawn)), layout="constrained")
    canvas.suptitle(f"{report.benchmark}  {report.hardware['cpu']}")
    axes = canvas.subplots(len(drawn), squeeze=False)[:, 0]
    for axis, (name, values) in zip(axes, drawn.items(), strict=True):
        axis.plot(values, [0] * len(values), "o", alpha=0.5)
        axis.axvline(median(values), color="black", linewidth=1)
        axis.set_yticks([0], [name])
    canvas.savefig(out, dpi=120)
