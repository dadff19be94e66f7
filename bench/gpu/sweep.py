"""A load's speed by size of blocks, number of readers and of threads for the digest, so that defaults can be chosen.

The loader alone, in this process, of a file in the page cache; the order is shuffled anew in every round.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Sequence

from bench.gpu import files
from bench.gpu.copying import MIB
from bench.gpu.loads import load_here
from bench.gpu.part import Context, Measured
from bench.gpu.reading import warm
from bench.report import Figure, median
from lunashm.host.pace import Pace
from lunashm.memory import cuda, rung_for

BLOCKS = (2 * MIB, 8 * MIB, 16 * MIB, 32 * MIB)
READERS = (2, 4, 8, 16)
_SPARE = 4
DIGESTERS = (1, 8)
_ROUNDS = 2


def paces(dry: bool) -> Sequence[Pace]:
    if dry:
        return [Pace(MIB // 2, 4, 2, 1), Pace(MIB, 4, 1, 2)]
    cores = len(os.sched_getaffinity(0))
    grid = itertools.product(BLOCKS, [readers for readers in READERS if readers <= cores], DIGESTERS)
    return [Pace(block, readers + _SPARE, readers, digesters) for block, readers, digesters in grid]


def run(context: Context) -> Measured:
    file = files.sdxl(context.scratch, context.dry)
    device = cuda.resolve(context.device)
    rung = rung_for("cuda-vmm", device)
    size = file.stat().st_size
    chosen = [*paces(context.dry), Pace.on(device)]
    samples: dict[str, list[float]] = {}
    warm(file)
    load_here(file, rung)
    order = random.Random(1)
    for _ in range(1 if context.dry else _ROUNDS):
        for pace in order.sample(chosen, len(chosen)):
            samples.setdefault(f"{name_of(pace)}, GB/s", []).append(size / 1e9 / load_here(file, rung, pace))
    ranked = sorted(samples, key=lambda name: -median(samples[name]))
    ours = f"{name_of(Pace.on(device))}, GB/s"
    figures = [Figure(f"{name.removesuffix(', GB/s')}, median", median(samples[name]), "GB/s") for name in ranked[:8]]
    figures.append(Figure("the default / the best", median(samples[ours]) / median(samples[ranked[0]]), "ratio"))
    return Measured(figures, samples, {"best": ranked[0], "default": ours, "file": file.name})


def name_of(pace: Pace) -> str:
    return f"{pace.block_nbytes / MIB:g} MiB x {pace.buffers}, {pace.readers} readers, {pace.digesters} digesting"
