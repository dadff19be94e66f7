"""What a part of the GPU suite is made of: steps that each measure something and leave one file behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.report import Figure


@dataclass(frozen=True)
class Context:
    """Where a step runs.

    device   "cuda:0"; in a dry run too, where the driver is the stand-in, or nothing on a GPU is measured at all
    dry      no GPU: toy sizes, stand-in driver or CPU; nothing that comes of it is a figure of a GPU
    scratch  checkpoints and the like, kept between steps and parts
    comfyui  a checkout, or None where there is none
    """

    device: str
    dry: bool
    scratch: Path
    comfyui: Path | None


@dataclass(frozen=True)
class Measured:
    """What a step found. ``facts``: what has no unit: answers, error names, versions."""

    figures: Sequence[Figure] = ()
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Step:
    """``expected_s``: on an H100; the suite's time limit for a part is shared out by it."""

    name: str
    run: Callable[[Context], Measured]
    expected_s: float
    needs_comfyui: bool = False


@dataclass(frozen=True)
class Part:
    """Steps that together finish in under 8 minutes on one GPU."""

    number: int
    name: str
    title: str
    steps: tuple[Step, ...]
