"""Part 5: the servers of part 3 in other circumstances: under MPS, with other flags, with weights in RAM.

A part of its own, so that each ends in 8 minutes. What has to be on the machine: bench.gpu.sdxl.
"""

from __future__ import annotations

import dataclasses

from bench.gpu import memory_figures, memory_flags, memory_ram
from bench.gpu.memory_fleet import grown
from bench.gpu.mps import Mps, MpsUnavailable
from bench.gpu.part import Context, Measured, Part, Step
from bench.report import Figure

COUNT = 4
KINDS = ("shared", "stock")


def mps(context: Context) -> Measured:
    """Throughput and memory of N servers whose kernels run at the same time; to be held against part 3's N=4."""
    figures: list[Figure] = []
    samples: dict[str, list[float]] = {}
    notes: list[str] = []
    try:
        with Mps() as service:
            for kind in KINDS:
                fleet = grown(context, kind, (1,) if context.dry else (COUNT,), service.environment)
                figures += memory_figures.figures(fleet)
                samples |= memory_figures.samples([fleet])
                notes += fleet.notes
            notes.append(f"MPS servers that ran: {len(service.servers())}")
    except MpsUnavailable as exc:
        notes.append(f"MPS cannot be used here: {exc}")
    return Measured(
        [dataclasses.replace(figure, figure=f"with MPS: {figure.figure}", target=None) for figure in figures],
        {f"with MPS: {name}": values for name, values in samples.items()},
        {"MPS": "used" if figures else "not used"},
        notes,
    )


PART = Part(
    5,
    "modes",
    "ComfyUI servers under MPS, with other flags, and with weights in RAM",
    (
        Step("mps", mps, 140.0, needs_comfyui=True),
        Step("flags", memory_flags.run, 180.0, needs_comfyui=True),
        Step("ram-tier", memory_ram.run, 90.0, needs_comfyui=True),
    ),
)
