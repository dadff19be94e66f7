"""Attach to a loaded model, against loading the same file privately.

attach, same process     lunashm.client.attach() to a complete state dict, again and again; each time all views of the
                         last one are dropped first, so the segment is mapped anew
attach, fresh process    the same, once in each of several new processes: finding the host, connecting and registering
                         included, importing Python modules not
load_file                safetensors.torch.load_file of the file in the page cache, in fresh processes; it maps the file
                         and reads nothing yet
load_file + copy         the same, then every tensor copied into private memory, as a loader of modules does
+ touch                  one element of every tensor read, on top

Python's garbage is collected before each, and collection stays on: a full one takes 80 ms in a process that has
imported torch, and would otherwise fall to whoever allocates next.

    python -m bench.attach --arch sd15 --dtype fp32
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from bench import workload
from bench.checkpoints import ROOT
from bench.host import HostProcess
from bench.report import Figure, Report, add_arguments, emit, median
from lunashm.memory import ram

if TYPE_CHECKING:
    import torch

MS = 1e3
CHILD_TIMEOUT_S = 600
WAYS = ("attach", "load_file", "load_file + copy")

Samples = dict[str, list[float]]


# --- what is timed, in a process of its own -------------------------------------------------------


def timed(way: str, file: str, endpoint: str) -> dict[str, float]:
    """Milliseconds of one way to get a state dict, and of reading one element of each tensor afterwards."""
    make = _maker(way, file, endpoint)
    gc.collect()
    began = time.perf_counter()
    held = make()
    ready = time.perf_counter()
    for tensor in held.values():
        tensor.flatten()[0].item()
    touched = time.perf_counter()
    return {"ready": (ready - began) * MS, "touched": (touched - began) * MS, "tensors": len(held)}


def _maker(way: str, file: str, endpoint: str) -> Callable[[], dict[str, torch.Tensor]]:
    from safetensors.torch import load_file  # noqa: PLC0415 - imports are not part of what is timed

    from lunashm.client import attach  # noqa: PLC0415

    ways: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
        "attach": lambda: attach(file, endpoint=endpoint).state_dict(),
        "load_file": lambda: load_file(file),
        "load_file + copy": lambda: {name: tensor.clone() for name, tensor in load_file(file).items()},
    }
    return ways[way]


def in_fresh_process(way: str, file: Path, host: HostProcess) -> dict[str, float]:
    code = (
        "import json, sys; from bench.attach import timed; "
        "print(json.dumps(timed(sys.argv[1], sys.argv[2], sys.argv[3])))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, way, str(file), host.endpoint.url],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=CHILD_TIMEOUT_S,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{way} failed (exit {done.returncode}):\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout))


# --- the runs -------------------------------------------------------------------------------------


def run(file: Path, repeats: int, processes: int) -> tuple[Samples, int, list[str]]:
    """Milliseconds by way, the number of tensors, and what was left out."""
    found: Samples = {}
    notes = []
    ways = list(WAYS)
    need = file.stat().st_size * 2.2  # the host's copy and the private one
    if need > ram.available():
        ways.remove("load_file + copy")
        notes.append(f"load_file + copy was left out: {need / 1e9:.1f} GB needed, {ram.available() / 1e9:.1f} GB free")
    with HostProcess(roots=[file.resolve().parent]) as host:
        attached = timed("attach", str(file), host.endpoint.url)  # the host loads
        workload.read_through(file)
        same = [timed("attach", str(file), host.endpoint.url) for _ in range(repeats)]
        found["attach, same process, ms"] = [sample["ready"] for sample in same]
        found["attach + touch, same process, ms"] = [sample["touched"] for sample in same]
        for index in range(processes):
            for way in ways:
                sample = in_fresh_process(way, file, host)
                found.setdefault(f"{way}, fresh process, ms", []).append(sample["ready"])
                found.setdefault(f"{way} + touch, fresh process, ms", []).append(sample["touched"])
            print(f"round {index + 1} of {processes} done", file=sys.stderr)
    return found, int(attached["tensors"]), notes


def main(argv: list[str] | None = None) -> int:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m bench.attach", description=about)
    parser.add_argument("--repeats", type=int, default=50, help="attaches in one process (default: 50)")
    parser.add_argument("--processes", type=int, default=10, help="fresh processes of each kind (default: 10)")
    workload.add_arguments(parser, arch="sd15", dtype="fp32", render=False)
    add_arguments(parser)
    args = parser.parse_args(argv)
    file = workload.checkpoint_file(args)
    samples, tensors, notes = run(file, args.repeats, args.processes)
    middle = {name.removesuffix(", ms"): median(values) for name, values in samples.items()}
    warm = f"attach of {tensors} tensors, warm"
    figures = [
        Figure(f"{warm}, same process, median", middle["attach, same process"], "ms", "<= 20"),
        Figure(f"{warm}, fresh process, median", middle["attach, fresh process"], "ms", "<= 20"),
        Figure("attach + touch, fresh process, median", middle["attach + touch, fresh process"], "ms"),
        Figure("load_file, fresh process, median", middle["load_file, fresh process"], "ms"),
        Figure("load_file + touch, fresh process, median", middle["load_file + touch, fresh process"], "ms"),
    ]
    if "load_file + copy, fresh process" in middle:
        copy = middle["load_file + copy, fresh process"]
        figures.append(Figure("load_file + copy, fresh process, median", copy, "ms"))
        figures.append(Figure("load_file + copy / attach", copy / middle["attach, fresh process"], "ratio"))
    return 0 if emit(Report.of("attach", figures, samples, notes=notes), args.json, args.save) else 1


if __name__ == "__main__":
    sys.exit(main())
