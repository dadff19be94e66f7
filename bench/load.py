"""The host's load into shared memory against reading the same file and copying it once in memory.

Interleaved, in alternating order, with the file in the page cache:

load             lunashm.host.loader.load: read, digest, place in a new segment, freeze
read + copy      the reference: preadv of the whole file into new private memory of its size, then one copy into another
digest           lunashm.host.loader.digest: read and BLAKE3 alone
read + copy, reused
                 the reference once more in memory that is already there: the least that two passes can cost. It pays
                 for no new page, as every real load must

    python -m bench.load --arch sd15 --dtype fp32
"""

from __future__ import annotations

import argparse
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench import workload
from bench.report import Figure, Report, add_arguments, emit, median
from lunashm.host import checkpoint, loader
from lunashm.memory import ram
from lunashm.memory.posix import PosixRung

CALL_NBYTES = 1 << 30  # one preadv takes at most 2 GiB
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS  # Python's own default is shared memory

Ways = dict[str, Callable[[], float]]


def load(file: Path) -> float:
    """Seconds from an open header to a frozen segment; the segment is freed again."""
    found = checkpoint.read(file)
    layout = loader.plan(found, ())
    began = time.perf_counter()
    loaded = loader.load(found, layout, PosixRung(), _no_progress)
    took_s = time.perf_counter() - began
    loaded.segment.free()
    return took_s


def digest(file: Path) -> float:
    found = checkpoint.read(file)
    began = time.perf_counter()
    loader.digest(found, _no_progress)
    return time.perf_counter() - began


def read_and_copy(file: Path) -> float:
    """Both memories are new to this process."""
    size = file.stat().st_size
    began = time.perf_counter()
    with mmap.mmap(-1, size, PRIVATE) as first, mmap.mmap(-1, size, PRIVATE) as second:
        _read_and_copy(file, first, second)
        return time.perf_counter() - began


def _read_and_copy(file: Path, first: mmap.mmap, second: mmap.mmap) -> None:
    with open(file, "rb", buffering=0) as opened, memoryview(first) as read, memoryview(second) as copied:
        done = 0
        while done < len(read):
            done += os.preadv(opened.fileno(), [read[done : done + CALL_NBYTES]], done)
        copied[:] = read


def read_and_copy_reused(file: Path) -> float:
    """The second of two passes over the same memory."""
    size = file.stat().st_size
    with mmap.mmap(-1, size, PRIVATE) as first, mmap.mmap(-1, size, PRIVATE) as second:
        _read_and_copy(file, first, second)
        began = time.perf_counter()
        _read_and_copy(file, first, second)
        return time.perf_counter() - began


def _no_progress(done: int, total: int) -> None:
    pass


def run(file: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds by way, round by round. Every second round goes backwards: freed pages are cheaper for who comes next."""
    ways: Ways = {
        "load": lambda: load(file),
        "read + copy": lambda: read_and_copy(file),
        "digest": lambda: digest(file),
        "read + copy, reused": lambda: read_and_copy_reused(file),
    }
    took_s: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(rounds):
        for name in list(ways) if index % 2 == 0 else reversed(ways):
            workload.read_through(file)
            took_s[name].append(ways[name]())
        print(f"round {index + 1}: " + ", ".join(f"{n} {v[-1]:.2f} s" for n, v in took_s.items()), file=sys.stderr)
    return took_s


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=about)
    parser.add_argument("--rounds", type=int, default=6, help="default: 6")
    workload.add_arguments(parser, arch="sd15", dtype="fp32", render=False)
    add_arguments(parser)
    args = parser.parse_args(argv)
    file = workload.checkpoint_file(args).resolve()
    size = file.stat().st_size
    need, free = 2.2 * size, ram.available()
    if need > free:
        sys.exit(f"the reference needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; take a smaller --checkpoint")
    took_s = run(file, args.rounds)
    gb_s = {f"{name}, GB/s": [size / 1e9 / value for value in values] for name, values in took_s.items()}
    ratios = {
        name: [reference / ours for reference, ours in zip(took_s[name], took_s["load"], strict=True)]
        for name in ("read + copy", "read + copy, reused")
    }
    hashing = [alone / ours for alone, ours in zip(took_s["digest"], took_s["load"], strict=True)]
    figures = [
        Figure("load / read + copy, speed, median of rounds", median(ratios["read + copy"]), "ratio", ">= 0.7"),
        Figure("load / read + copy in reused memory, speed", median(ratios["read + copy, reused"]), "ratio"),
        Figure("digest alone / load, time", median(hashing), "ratio"),
        *(Figure(f"{name.removesuffix(', GB/s')}, median", median(values), "GB/s") for name, values in gb_s.items()),
    ]
    return 0 if emit(Report.of("load", figures, gb_s), args.json, args.save) else 1


if __name__ == "__main__":
    sys.exit(main())
