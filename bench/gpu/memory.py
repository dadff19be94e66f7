"""Part 3: memory and time of real ComfyUI servers on a GPU, stock against shared, SDXL at 1024x1024.

Servers run with ComfyUI's default flags (cudaMallocAsync, DynamicVRAM by comfy-aimdo where it is installed). What has
to be on the machine: bench.gpu.sdxl. How ComfyUI fares with other flags, under MPS and with weights in RAM is part 5
(bench.gpu.memory_modes), so that each part ends in 8 minutes.
"""

from __future__ import annotations

from bench.gpu import memory_figures, memory_single, sdxl
from bench.gpu.memory_fleet import grown
from bench.gpu.part import Context, Measured, Part, Step

COUNTS = (1, 2, 4, 8)
DRY_COUNTS = {"shared": (1, 2), "stock": (1,)}


def _fleet(context: Context, kind: str) -> Measured:
    fleet = grown(context, kind, DRY_COUNTS[kind] if context.dry else COUNTS)
    facts = {
        f"{kind}: {fleet.unit} before anything started, GB": round(fleet.before / 1e9, 3),
        f"{kind}: SHA-256 of the images": memory_figures.digests(fleet),
    }
    return Measured(memory_figures.figures(fleet), memory_figures.samples([fleet]), facts, fleet.notes)


def shared(context: Context) -> Measured:
    return _fleet(context, "shared")


def stock(context: Context) -> Measured:
    return _fleet(context, "stock")


PART = Part(
    3,
    "memory",
    "Real ComfyUI servers: memory, time and images, stock against shared",
    (
        Step("checkpoint", sdxl.make, 45.0, needs_comfyui=True),
        Step("single", memory_single.run, 105.0, needs_comfyui=True),
        Step("servers-shared", shared, 140.0, needs_comfyui=True),
        Step("servers-stock", stock, 150.0, needs_comfyui=True),
    ),
)
