"""What a step leaves behind: one JSON file in the benchmarks' common form, with what the suite adds to it.

Owns the file's name, its form and when it counts as finished. Knows no parts, and runs nothing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lunashm
from bench.gpu.part import Measured
from bench.report import Figure, Report, finite, lists_on_one_line

OK, FAILED, DIED, TIMEOUT = "ok", "failed", "died", "timeout"
DRY_RUN = "DRY RUN: toy sizes, a stand-in driver or the CPU; nothing in here is a figure of a GPU"
_PACKAGES = ("cuda-bindings", "pyzmq", "numpy")


@dataclass(frozen=True)
class Place:
    """One step's file. ``dry`` and ``code`` are of the run that asks."""

    out: Path
    part: int
    step: str
    dry: bool
    code: str

    @property
    def path(self) -> Path:
        return self.out / f"part{self.part}-{self.step}.json"

    def read(self) -> dict[str, Any] | None:
        """What is there, whatever became of it; None for nothing, or for what is no record."""
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and "status" in found else None

    def finished(self, any_code: bool = False) -> bool:
        """Whether the step need not run: it went well, by the same code (or ``any_code``), and was as dry."""
        found = self.read()
        return (
            found is not None
            and found["status"] == OK
            and found["dry"] == self.dry
            and (any_code or found["code"] == self.code)
        )

    def write(self, measured: Measured, status: str, seconds: float, error: str = "") -> None:
        """The file appears whole or not at all."""
        report = Report.of(self.benchmark, _judged(measured.figures, self.dry), measured.samples, notes=measured.notes)
        whole = report.as_dict()
        whole["versions"] = {**whole["versions"], **_versions()}
        about = {"about": DRY_RUN} if self.dry else {}
        record: dict[str, Any] = {
            **about, "part": self.part, "step": self.step, "dry": self.dry, "status": status, "error": error,
            "seconds": round(seconds, 3), "code": self.code, "facts": finite(measured.facts), **whole,
        }  # fmt: skip
        self.out.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(f".{os.getpid()}.part")
        unfinished.write_text(lists_on_one_line(json.dumps(record, indent=2, default=str)) + "\n")
        unfinished.replace(self.path)

    @property
    def benchmark(self) -> str:
        return f"gpu-part{self.part}-{self.step}" + (" (DRY RUN)" if self.dry else "")


def _judged(figures: Sequence[Figure], dry: bool) -> list[Figure]:
    """In a dry run no figure meets or misses anything."""
    return [dataclasses.replace(figure, target=None) for figure in figures] if dry else list(figures)


def _versions() -> dict[str, str]:
    """lunashm may run from its sources, uninstalled."""
    found = {"lunashm": lunashm.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
