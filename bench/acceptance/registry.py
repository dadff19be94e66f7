"""The eight tests, by the numbers that users know them by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.acceptance import failures, instances, loads, mixes, soak, stacks, strengths, together
from bench.acceptance.findings import Findings
from bench.acceptance.stage import Stage


@dataclass(frozen=True)
class Test:
    name: str
    title: str
    run: Callable[[Stage, Findings], None]


TESTS = (
    Test("T1", "a model loads through the Router, and through every stock loader", loads.run),
    Test("T2", "memory of N servers, stock against shared", instances.run),
    Test("T3", "two LoRAs as a stack", stacks.run),
    Test("T4", "shared or local MODEL with shared or local CLIP", mixes.run),
    Test("T5", "servers with different LoRAs at once", together.run),
    Test("T6", "no host, a host that refuses, no LoRA", failures.run),
    Test("T7", "50 steps and 100 prompts", soak.run),
    Test("T8", "strengths and stacks", strengths.run),
)
BY_NAME = {test.name: test for test in TESTS}

ORDER = ("T2", "T1", "T3", "T4", "T5", "T7", "T8", "T6")
"""In which they run: T2 wants servers that have done nothing yet, and T6 ends the host."""
