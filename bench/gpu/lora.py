"""Part 4: LoRAs on SDXL at 1024x1024 on a GPU, shared against stock merge and stock bypass.

steps     one forward at a time (bench.lora on the GPU): overhead, switch, memory, against stock merge and bypass. The
          processes are ComfyUI without its server: cudaMallocAsync as there, DynamicVRAM not, which is the kinder case
          for stock (merged weights stay where they are)
servers   the same LoRAs by stock nodes in real servers with default flags: time per step, a switch, the picture
rule      what a fresh weight and a branch cost on SDXL's layers, for the constant of the rule that chooses
accuracy  how far both are from float64, in half precision

What has to be on the machine: bench.gpu.sdxl.
"""

from __future__ import annotations

import dataclasses

from bench import checkpoints, lora, lora_figures
from bench.gpu import lora_accuracy, lora_pictures, lora_rules, sdxl
from bench.gpu.part import Context, Measured, Part, Step
from bench.lora_figures import PERCENT
from bench.lora_processes import Setting, stacked
from bench.report import Figure

RANK = 16
DEPTHS, DRY_DEPTHS = (1, 2, 4, 8), (2,)
ROUNDS = 4
REPEATS = 5
TARGETS = {2: "<= 3", 8: "<= 10"}
"""Percent that a step may take longer, by the number of LoRAs of rank 16."""
STACKED = 4
"""LoRAs that switching needs: two stacks of two."""


def files(context: Context) -> Setting:
    model, rank = sdxl.checkpoint(context), 4 if context.dry else RANK
    folder = context.scratch / "models" / "loras" / model.stem
    folder.mkdir(parents=True, exist_ok=True)
    count = max(STACKED, *(DRY_DEPTHS if context.dry else DEPTHS))
    return Setting(
        model.stem, model, stacked(model, folder, count, rank), sdxl.size_of(context).side,
        checkpoints.comfy_root(context.comfyui), sdxl.device_of(context), 1 if context.dry else REPEATS,
        sdxl.environment_of(context),
    )  # fmt: skip


def steps(context: Context) -> Measured:
    setting = files(context)
    depths, rounds = (DRY_DEPTHS, 1) if context.dry else (DEPTHS, ROUNDS)
    measured = lora.run(setting, 4 if context.dry else RANK, depths, rounds)
    goals = [
        Figure(f"{lora_figures.many(depth)} of rank {measured.rank}: a step takes longer by",
               measured.overhead("ours", depth) * PERCENT, "%", TARGETS.get(depth))
        for depth in depths
    ]  # fmt: skip
    bare = [dataclasses.replace(figure, target=None) for figure in lora_figures.figures(measured)]
    calls = len(measured.calls)
    notes = [f"{measured.step_flops / 1e12:.2f} T operations a step of two latents, {calls} layer calls patched"]
    return Measured([*goals, *bare], lora_figures.samples(measured), notes=notes)


def pictures(context: Context) -> Measured:
    return lora_pictures.run(context, files(context).loras)


PART = Part(
    4,
    "lora",
    "LoRAs on SDXL: time per step, switch, memory, pictures, against stock merge and bypass",
    (
        Step("steps", steps, 200.0, needs_comfyui=True),
        Step("servers", pictures, 150.0, needs_comfyui=True),
        Step("rule", lora_rules.run, 40.0),
        Step("accuracy", lora_accuracy.run, 20.0),
    ),
)
