"""How near a load into shared memory comes to what this machine can do at all.

Of one file in the page cache, in alternating order, GB of file per second:

load into RUNG           lunashm.host.loader.load: read, digested, placed in a new segment, frozen
copy into RUNG           the same memory filled by one thread with preadv and pwrite through one buffer, nothing
                         digested: what the kernel takes to copy the file and to find pages for it
blake3                   bytes in memory digested by one thread, nothing read: no digested load is faster with one
load_file + copy         safetensors' load_file, every tensor copied into private memory, in a fresh process each time
                         (in an old one the allocator has the pages already): what a process does without a host;
                         load_file alone maps the file and reads nothing

A load does what `copy` and `blake3` do, at the same time where there are two cores. So its ceiling is the slower of the
two; one after the other they would take the sum of both times.

    python -m bench.loading --arch sd15 --dtype fp32
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from blake3 import blake3
from safetensors.torch import load_file

from bench import workload
from bench.checkpoints import ROOT
from bench.quiet import QUIET_CORES, Stopwatch
from bench.report import Figure, Report, add_arguments, emit, median
from lunashm.host import checkpoint, loader
from lunashm.host.pace import Pace
from lunashm.memory import CPU, ON_CPU, Rung, ram, rung_for

PIECE_NBYTES = 1 << 20
CHILD_TIMEOUT_S = 600

Ways = dict[str, Callable[[], float]]


def load(file: Path, rung: Rung) -> float:
    """Seconds from an open header to a frozen segment; the segment is freed again."""
    found = checkpoint.read(file)
    layout = loader.plan(found, ())
    began = time.perf_counter()
    loaded = loader.load(found, layout, rung, _no_progress)
    took_s = time.perf_counter() - began
    loaded.segment.free()
    return took_s


def copy(file: Path, rung: Rung) -> float:
    size = file.stat().st_size
    buffer = memoryview(bytearray(PIECE_NBYTES))
    began = time.perf_counter()
    segment = rung.allocate(size)
    try:
        with open(file, "rb", buffering=0) as opened:
            done = 0
            while count := os.preadv(opened.fileno(), [buffer], done):
                segment.write(done, buffer[:count])
                done += count
        return time.perf_counter() - began
    finally:
        segment.free()


def digest(size: int) -> float:
    """Of one piece again and again: it stays in the cache, as a piece that was just read does."""
    piece = bytearray(os.urandom(PIECE_NBYTES))
    hasher = blake3()
    began = time.perf_counter()
    for _ in range(size // PIECE_NBYTES):
        hasher.update(piece)
    return time.perf_counter() - began


def load_and_copy(file: Path) -> float:
    """Imports are not part of it."""
    began = time.perf_counter()
    held = {name: tensor.clone() for name, tensor in load_file(file).items()}
    took_s = time.perf_counter() - began
    del held
    return took_s


def in_fresh_process(file: Path) -> float:
    code = "import sys; from pathlib import Path; from bench.loading import load_and_copy; "
    code += "print(load_and_copy(Path(sys.argv[1])))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=CHILD_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"load_file failed (exit {done.returncode}):\n{done.stderr[-3000:]}")
    return float(done.stdout)


def _no_progress(done: int, total: int) -> None:
    pass


def run(file: Path, rungs: list[str], rounds: int) -> tuple[dict[str, list[float]], int]:
    """Seconds by way, round by round, and how many rounds others disturbed. Every second round goes backwards."""
    ways: Ways = {}
    for name in rungs:
        rung = rung_for(name, CPU)
        ways[f"load into {name}"] = lambda rung=rung: load(file, rung)
        ways[f"copy into {name}"] = lambda rung=rung: copy(file, rung)
    ways["blake3"] = lambda: digest(file.stat().st_size)
    ways["load_file + copy"] = lambda: in_fresh_process(file)
    took_s: dict[str, list[float]] = {name: [] for name in ways}
    disturbed = 0
    workload.read_through(file)
    for index in range(rounds):
        watch = Stopwatch([])
        for name in list(ways) if index % 2 == 0 else reversed(ways):
            took_s[name].append(ways[name]())
        disturbed += watch.read()[1] > QUIET_CORES
        print(f"round {index + 1}: " + ", ".join(f"{n} {v[-1]:.2f} s" for n, v in took_s.items()), file=sys.stderr)
    return took_s, disturbed


def figures(took_s: dict[str, list[float]], rungs: list[str], size: int) -> list[Figure]:
    """Ratios are of pairs in one round: what else the machine does meanwhile slows both."""
    found = []
    for name in rungs:
        ours, plain = took_s[f"load into {name}"], took_s[f"copy into {name}"]
        ceilings = [max(pair) for pair in zip(plain, took_s["blake3"], strict=True)]
        sums = [sum(pair) for pair in zip(plain, took_s["blake3"], strict=True)]
        found += [
            Figure(f"{name}: load / its ceiling, speed", _ratio(ceilings, ours), "ratio"),
            Figure(f"{name}: load / copy and digest one after the other, speed", _ratio(sums, ours), "ratio"),
            Figure(f"{name}: load / load_file + copy, speed", _ratio(took_s["load_file + copy"], ours), "ratio"),
        ]
    found += [Figure(f"{way}, median", size / 1e9 / median(values), "GB/s") for way, values in took_s.items()]
    return found


def _ratio(reference: list[float], ours: list[float]) -> float:
    return median([one / two for one, two in zip(reference, ours, strict=True)])


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.loading", description=about)
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    parser.add_argument("--rungs", default=",".join(ON_CPU), help=f"default: {','.join(ON_CPU)}")
    workload.add_arguments(parser, arch="sd15", dtype="fp32", render=False)
    add_arguments(parser)
    args = parser.parse_args(argv)
    file = workload.checkpoint_file(args).resolve()
    size = file.stat().st_size
    rungs = args.rungs.split(",")
    free = min([ram.available(), *(rung_for(name, CPU).free_nbytes() for name in rungs)])
    if size > free * 0.9:
        sys.exit(f"{size / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; take a smaller --checkpoint")
    took_s, disturbed = run(file, rungs, args.rounds)
    pace = Pace.on(CPU)
    notes = [
        f"{file.name}, {size / 1e9:.2f} GB; {pace.readers} reader(s), {pace.buffers} buffers of "
        f"{pace.block_nbytes >> 10} KiB, {pace.digesters} thread(s) for the digest",
        f"{disturbed} of {args.rounds} rounds with more than {QUIET_CORES:g} cores used by others",
    ]
    samples = {f"{way}, GB/s": [size / 1e9 / value for value in values] for way, values in took_s.items()}
    report = Report.of("loading", figures(took_s, rungs, size), samples, notes=notes)
    return 0 if emit(report, args.json, args.save) else 1


if __name__ == "__main__":
    sys.exit(main())
