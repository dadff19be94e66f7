"""What this machine can do at all: copies to the device, reads of a file, copies in RAM, digests. GB/s each.

A load does all of these at once, so none can be faster than the slowest of them. Buffers for the device are
page-locked by the driver, as the host's own are, or by torch.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

from bench.gpu import files
from bench.gpu.copying import MIB, copies, copy_in_ram, digest, torch_copy
from bench.gpu.part import Context, Measured
from bench.gpu.reading import drop, read, warm
from bench.report import Figure, median
from lunashm.memory import cuda
from lunashm.memory.cuda_device import device_of


@dataclass(frozen=True)
class Scale:
    """How much is moved, and in which pieces; ``cold``: from a disk, which may be slow."""

    copied: int
    blocks: tuple[int, ...]
    threaded: tuple[int, ...]
    threads: tuple[int, ...]
    read_block: int
    cold: int

    @classmethod
    def of(cls, dry: bool) -> Scale:
        if dry:
            return cls(1 * MIB, (MIB // 4,), (MIB // 4,), (1, 2), MIB // 4, MIB)
        blocks = tuple(size * MIB for size in (1, 4, 8, 16, 64, 256))
        return cls(4096 * MIB, blocks, (MIB, 8 * MIB, 256 * MIB), (1, 2, 4, 8), 8 * MIB, 2048 * MIB)


def copied(context: Context) -> Measured:
    """To the device, by block size and threads; in RAM; and through the digest."""
    from bench.gpu import torch_gpu  # noqa: PLC0415 - torch takes seconds, and most steps need none of it

    torch_gpu.use(context.device, context.dry)
    scale, found = Scale.of(context.dry), _Samples(context.dry)
    gpu = device_of(cuda.resolve(context.device))
    for block in scale.blocks:
        for threads in scale.threads if block in scale.threaded else scale.threads[:1]:
            with copies(gpu, block, threads) as copy:
                found.take(f"pinned to device, blocks of {block / MIB:g} MiB, {threads} thread(s)", copy, scale.copied)
    found.take("pinned to device, torch's copy_", torch_copy, scale.blocks[-1], scale.copied)
    for threads in scale.threads:
        found.take(f"RAM to RAM, {threads} thread(s)", copy_in_ram, scale.copied, threads)
        found.take(f"BLAKE3, {threads} thread(s)", digest, scale.copied, scale.read_block, threads)
    return found.measured([])


def read_in(context: Context) -> Measured:
    """A file into page-locked memory, from the page cache and from its disk, by number of threads."""
    scale, found = Scale.of(context.dry), _Samples(context.dry)
    notes: list[str] = []
    file = files.sdxl(context.scratch, context.dry)
    gpu = device_of(cuda.resolve(context.device))
    warm(file)
    for threads in scale.threads:
        found.take(f"file in the page cache, {threads} thread(s)", read, gpu, file, threads, scale.read_block)
    part = functools.partial(read, most=scale.cold)
    for threads in (scale.threads[0], scale.threads[-1]):

        def cold(threads: int = threads) -> float:
            drop(file, notes)
            return part(gpu, file, threads, scale.read_block)

        found.take(f"file from disk, {threads} thread(s)", cold)
    try:
        direct = functools.partial(part, flags=os.O_DIRECT)
        found.take(f"file from disk, O_DIRECT, {threads} thread(s)", direct, gpu, file, threads, scale.read_block)
    except OSError as exc:
        notes.append(f"O_DIRECT is not possible here: {exc}")
    warm(file)
    return found.measured(notes)


class _Samples:
    """GB/s by name."""

    def __init__(self, dry: bool) -> None:
        self._repeats = 1 if dry else 3
        self._samples: dict[str, list[float]] = {}

    def take(self, name: str, way: Callable[..., float], *arguments: object) -> None:
        self._samples[f"{name}, GB/s"] = [way(*arguments) for _ in range(self._repeats)]

    def measured(self, notes: list[str]) -> Measured:
        figures = [Figure(f"{n.removesuffix(', GB/s')}, median", median(v), "GB/s") for n, v in self._samples.items()]
        return Measured(figures, self._samples, {"cores": len(os.sched_getaffinity(0))}, notes)
