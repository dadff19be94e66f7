"""Branch or fresh weight on SDXL's layers on this GPU: bench.lora_rule there, and which constant the rule should have.

What is assumed for GPUs is `_PASS_MACS_ELSEWHERE` in lunashm.client.lowrank.injection; the facts say which constants
would lose least on these layers and ranks, and what that one loses.
"""

from __future__ import annotations

from typing import Any

import torch

from bench import lora_rule
from bench.gpu.part import Context, Measured
from bench.lora_rule import RANKS, SDXL_LAYERS, Cell
from bench.report import Figure
from lunashm.client.lowrank import injection

DRY_LAYERS = {"toy 64": (64, 64, 512), "toy 64 -> 256": (64, 256, 32)}
DRY_RANKS = (16,)
DTYPE = torch.float16
REPEATS, CALLS = 15, 20


def run(context: Context) -> Measured:
    layers, ranks = (DRY_LAYERS, DRY_RANKS) if context.dry else (SDXL_LAYERS, RANKS)
    device, repeats, calls = ("cpu", 2, 1) if context.dry else (context.device, REPEATS, CALLS)
    cells: list[Cell] = []
    samples: dict[str, list[float]] = {}
    for layer, shape in layers.items():
        for rank in ranks:
            cell, times = lora_rule.measure(layer, shape, rank, repeats, device, DTYPE, calls)
            cells.append(cell)
            samples |= {f"{layer}, rank sum {rank}: {way}, us": [s * 1e6 for s in ts] for way, ts in times.items()}
    return Measured(_figures(cells, torch.device(device).type), samples, _facts(cells))


def _figures(cells: list[Cell], kind: str) -> list[Figure]:
    constant = injection.PASS_MACS.get(kind, injection._PASS_MACS_ELSEWHERE)
    low, high, least = lora_rule.best_constants(cells)
    return [
        Figure("the rule's constant now", constant, "multiply-adds"),
        Figure("constants that lose least, from", low, "multiply-adds"),
        Figure("constants that lose least, below", high, "multiply-adds"),
        Figure("the best constant's choices / the better way each time", least, "ratio"),
        *lora_rule.figures(cells),
    ]


def _facts(cells: list[Cell]) -> dict[str, Any]:
    return {
        "a fresh weight is faster for": [f"{c.layer} at {c.rank}" for c in cells if c.fresh_s < c.branch_s],
        "the rule takes a fresh weight for": [f"{c.layer} at {c.rank}" for c in cells if c.takes_fresh],
        "break-even constants": {f"{c.layer} at {c.rank}": round(c.break_even, 1) for c in cells},
    }
