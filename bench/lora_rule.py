"""Branch or fresh weight: what each costs on layers of real models, and what the rule that chooses loses.

A patched layer computes each call in one of two ways (lunashm.client.lowrank). For each layer shape, number of
positions and rank sum both are timed in turn, as is the layer alone; the rule chooses without timing anything. Its
loss is the time of its choices over that of the better way each time.

    python -m bench.lora_rule [--device cuda] [--dtype bf16]
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.random_weights import DTYPES
from bench.report import Figure, Report, add_arguments, emit, median
from lunashm.client.lowrank import Injection, Update, injection

LAYERS = {
    "SD1.5 320, 64x64": (320, 320, 8192),
    "SD1.5 640, 32x32": (640, 640, 2048),
    "SD1.5 1280, 16x16": (1280, 1280, 512),
    "SD1.5 1280, 8x8": (1280, 1280, 128),
    "SD1.5 ff 1280 -> 10240, 16x16": (1280, 10240, 512),
    "CLIP-L 768, 77 tokens": (768, 768, 154),
    "CLIP-L 768 -> 3072, 77 tokens": (768, 3072, 154),
    "DiT 1536, 1024 tokens": (1536, 1536, 1024),
    "DiT 1536 -> 6144, 1024 tokens": (1536, 6144, 1024),
}
"""in, out, positions of a batch of two."""

SDXL_LAYERS = {
    "SDXL 640, 64x64": (640, 640, 8192),
    "SDXL ff 640 -> 5120, 64x64": (640, 5120, 8192),
    "SDXL ff 2560 -> 640, 64x64": (2560, 640, 8192),
    "SDXL text 2048 -> 640": (2048, 640, 154),
    "SDXL 1280, 32x32": (1280, 1280, 2048),
    "SDXL ff 1280 -> 10240, 32x32": (1280, 10240, 2048),
    "SDXL ff 5120 -> 1280, 32x32": (5120, 1280, 2048),
    "SDXL text 2048 -> 1280": (2048, 1280, 154),
}
"""Those of SDXL that LoRAs patch, at 1024x1024."""

RANKS = (16, 32, 64, 128)
BRANCH, FRESH = 1 << 60, -(1 << 60)


@dataclass(frozen=True)
class Cell:
    """Median seconds of one layer with one rank sum."""

    layer: str
    rank: int
    alone_s: float
    branch_s: float
    fresh_s: float
    takes_fresh: bool
    break_even: float
    """The rule takes a fresh weight where its constant (what writing an element costs) is below this."""

    @property
    def chosen_s(self) -> float:
        return self.fresh_s if self.takes_fresh else self.branch_s

    def chosen_by(self, constant: float) -> float:
        """Seconds of the way that the rule takes with another constant."""
        return self.fresh_s if constant < self.break_even else self.branch_s

    @property
    def best_s(self) -> float:
        return min(self.fresh_s, self.branch_s)


@torch.inference_mode()
def measure(
    layer: str, shape: tuple[int, int, int], rank: int, repeats: int, device: str, dtype: torch.dtype, calls: int = 1
) -> tuple[Cell, dict[str, list[float]]]:
    """`calls`: in one timing, one queued behind the other on a GPU, as in a model."""
    columns, rows, positions = shape
    module = torch.nn.Linear(columns, rows, device=device, dtype=dtype)
    x = torch.randn(positions, columns, device=device, dtype=dtype)
    update = Update((rows, columns))
    update.add(torch.randn(rows, rank) / rank, torch.randn(rank, columns) / columns**0.5)
    plain = module.forward
    put = Injection(module, update)
    takes_fresh = put.takes_fresh_weight(x)
    kind, standard = torch.device(device).type, dict(injection.PASS_MACS)
    times: dict[str, list[float]] = {"alone": [], "branch": [], "fresh": []}
    try:
        for _ in range(repeats + 1):
            times["alone"].append(_seconds(plain, x, calls))
            injection.PASS_MACS[kind] = BRANCH
            times["branch"].append(_seconds(module, x, calls))
            injection.PASS_MACS[kind] = FRESH
            times["fresh"].append(_seconds(module, x, calls))
    finally:
        injection.PASS_MACS.clear()
        injection.PASS_MACS.update(standard)
    for series in times.values():
        del series[0]  # the first makes the factors
    middle = {way: median(series) for way, series in times.items()}
    break_even = positions * rank * (rows + columns) / (rows * columns) - rank
    return Cell(layer, rank, middle["alone"], middle["branch"], middle["fresh"], takes_fresh, break_even), times


def _seconds(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, calls: int) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        call(x)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def loss(cells: Sequence[Cell], constant: float) -> float:
    """Time of the rule's choices with that constant, over that of the better way each time."""
    return sum(cell.chosen_by(constant) for cell in cells) / sum(cell.best_s for cell in cells)


def best_constants(cells: Sequence[Cell]) -> tuple[float, float, float]:
    """The range of constants that lose least, and that loss. Between two break-even points nothing changes."""
    edges = sorted({0.0, *(max(0.0, cell.break_even) for cell in cells)})
    losses = [loss(cells, edge) for edge in edges]
    least = min(losses)
    low = losses.index(least)
    high = next((at for at in range(low, len(edges)) if losses[at] > least), None)
    return edges[low], edges[high] if high is not None else float("inf"), least


def figures(cells: list[Cell]) -> list[Figure]:
    """Target: the rule may lose a tenth to the better way, over all cells."""
    best = sum(cell.best_s for cell in cells)
    chosen = sum(cell.chosen_s for cell in cells)
    return [
        Figure("the rule's choices / the better way each time", chosen / best, "ratio", "<= 1.1"),
        Figure("always the branch / the better way each time", sum(c.branch_s for c in cells) / best, "ratio"),
        Figure("always a fresh weight / the better way each time", sum(c.fresh_s for c in cells) / best, "ratio"),
        *(
            Figure(f"{cell.layer}, rank sum {cell.rank}: {name} / alone", seconds / cell.alone_s, "ratio")
            for cell in cells
            for name, seconds in (("branch", cell.branch_s), ("fresh weight", cell.fresh_s))
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.lora_rule", description=about)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32")
    add_arguments(parser)
    args = parser.parse_args(argv)
    cells: list[Cell] = []
    samples: dict[str, list[float]] = {}
    for layer, shape in LAYERS.items():
        for rank in RANKS:
            cell, times = measure(layer, shape, rank, args.repeats, args.device, DTYPES[args.dtype])
            cells.append(cell)
            samples |= {f"{layer}, rank sum {rank}: {way}, ms": [s * 1e3 for s in ts] for way, ts in times.items()}
    chosen = [f"{cell.layer} at {cell.rank}" for cell in cells if cell.takes_fresh]
    notes = [f"the rule takes a fresh weight for: {'; '.join(chosen) or 'none'}"]
    return 0 if emit(Report.of("lora_rule", figures(cells), samples, notes=notes), args.json, args.save) else 1


if __name__ == "__main__":
    sys.exit(main())
