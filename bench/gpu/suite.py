"""Which steps run now: those that are not finished, as far as their part's time goes. Knows no measurement.

Each runs in a process of its own (``child.py``), one after the other. What is still open is said at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu import child, machine, sources
from bench.gpu.part import Part, Step
from bench.gpu.record import OK, Place
from bench.gpu.step import REGISTRY

PART_LIMIT_S = 480.0
"""A part finishes in less than 8 minutes."""
DRY_STEP_S = 300.0
_LEAST_LIMIT_S = 60.0
_PATIENCE = 3
"""A step may take so many times what is expected of it, if its part's time allows."""


@dataclass(frozen=True)
class Run:
    """What was asked for. ``keep``: finished steps stay finished though the code has changed."""

    parts: Sequence[Part]
    out: Path
    scratch: Path
    dry: bool = False
    fresh: bool = False
    keep: bool = False
    limit_s: float = PART_LIMIT_S
    device: str = "cuda:0"
    comfyui: Path | None = None
    registry: str = REGISTRY
    say: Callable[[str], None] = field(default=lambda line: print(line, file=sys.stderr, flush=True))

    def place(self, part: Part, step: Step) -> Place:
        return Place(self.out, part.number, step.name, self.dry, self._code)

    @property
    def _code(self) -> str:
        return sources.digest()

    def arguments(self) -> list[str]:
        found = ["--scratch", str(self.scratch), "--device", self.device, "--registry", self.registry]
        found += ["--dry"] if self.dry else []
        return found + (["--comfyui", str(self.comfyui)] if self.comfyui is not None else [])


def run(asked: Run) -> dict[str, str]:
    """Run what is to be run; returns what is open now: ``{"1 contract": why}``."""
    open_steps: dict[str, str] = {}
    for part in asked.parts:
        open_steps |= _part(asked, part)
    return open_steps


def _part(asked: Run, part: Part) -> dict[str, str]:
    began = time.monotonic()
    open_steps: dict[str, str] = {}
    for step in part.steps:
        name, place = f"{part.number} {step.name}", asked.place(part, step)
        if not asked.fresh and place.finished(asked.keep):
            asked.say(f"{name}: done before")
            continue
        left_s = asked.limit_s - (time.monotonic() - began)
        why = _why_not(asked, step, left_s)
        if why:
            asked.say(f"{name}: left open, {why}")
            open_steps[name] = why
            continue
        asked.say(f"{name}: running, about {step.expected_s:.0f} s on an H100" if not asked.dry else f"{name}: running")
        limit_s = DRY_STEP_S if asked.dry else max(_LEAST_LIMIT_S, _PATIENCE * step.expected_s)
        status = child.run(place, asked.arguments(), machine.environment(asked.dry), min(limit_s, left_s))
        found = place.read() or {}
        asked.say(f"{name}: {status} after {found.get('seconds', 0):.1f} s")
        if status != OK:
            open_steps[name] = status
    return open_steps


def _why_not(asked: Run, step: Step, left_s: float) -> str:
    """Why a step is not run now; empty where it is."""
    if step.needs_comfyui and asked.comfyui is None:
        return "no ComfyUI checkout is named (--comfyui DIR)"
    expected_s = 0.0 if asked.dry else step.expected_s
    if left_s <= expected_s:
        if asked.limit_s <= expected_s:
            return f"it takes some {expected_s:.0f} s, more than --time-limit {asked.limit_s:.0f}"
        return "no time left; the next call goes on here"
    return ""
