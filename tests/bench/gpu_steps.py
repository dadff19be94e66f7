"""Steps of the GPU suite's parts run dry: at toy size, in this process."""

from __future__ import annotations

from pathlib import Path

from bench.gpu.part import Context, Measured, Part
from tests.tiers import comfy_checkout


def dry(scratch: Path) -> Context:
    return Context("cuda:0", True, scratch, comfy_checkout())


def run(part: Part, step: str, scratch: Path) -> Measured:
    return next(each for each in part.steps if each.name == step).run(dry(scratch))


def values(measured: Measured) -> dict[str, float]:
    return {figure.figure: figure.value for figure in measured.figures}
