"""The parts of the GPU suite, in the order in which they run. A part comes in by one line here."""

from __future__ import annotations

from bench.gpu import contract, loading, lora, memory, memory_modes
from bench.gpu.part import Part

PARTS: tuple[Part, ...] = (
    contract.PART,
    loading.PART,
    memory.PART,
    lora.PART,
    memory_modes.PART,
)
