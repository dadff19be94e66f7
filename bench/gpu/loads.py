"""A host's load into a GPU's memory, against what this machine can do at all, measured in the same rounds.

By a host (from the request to its answer, as a client would wait) and by the loader alone in this process, of a file
in the page cache. The limit is a copy of page-locked blocks of 256 MiB to the device, by one thread or by two,
whichever is faster.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path

from bench.gpu import clients, files
from bench.gpu.copying import MIB, copies
from bench.gpu.part import Context, Measured
from bench.gpu.reading import drop, read, warm
from bench.host import HostProcess
from bench.report import Figure, median
from lunashm.host import checkpoint, loader
from lunashm.host.pace import Pace
from lunashm.memory import Rung, cuda, rung_for
from lunashm.memory.cuda_device import device_of

TARGET = ">= 0.8"
_ROUNDS = 5
_CONVERTED_NBYTES = 2 * files.GB

Samples = dict[str, list[float]]


def warm_loads(context: Context) -> Measured:
    """From the page cache, on both rungs."""
    file = files.sdxl(context.scratch, context.dry)
    size = file.stat().st_size
    device = cuda.resolve(context.device)
    gpu = device_of(device)
    samples: Samples = {}
    warm(file)
    with (
        clients.host(context, file, "cuda-vmm") as vmm,
        clients.host(context, file, "cuda-ipc") as ipc,
        copies(gpu, MIB if context.dry else 256 * MIB, 1) as by_one,
        copies(gpu, MIB if context.dry else 256 * MIB, 2) as by_two,
    ):
        rung = rung_for("cuda-vmm", device)
        by_loader: Callable[[], float] = lambda: load_here(file, rung)  # noqa: E731 - beside the others
        ways = {"host on cuda-vmm": lambda: load_by(vmm, file), "host on cuda-ipc": lambda: load_by(ipc, file)}
        for way in (*ways.values(), by_loader):
            way()  # the first load of a process makes what later ones find
        for number in range(1 if context.dry else _ROUNDS):
            samples.setdefault("pinned copy, GB/s", []).append(max(by_one(size), by_two(size)))
            turn = list(({**ways, "loader alone": by_loader}).items())
            for name, way in turn if number % 2 == 0 else reversed(turn):
                samples.setdefault(f"{name}, GB/s", []).append(size / 1e9 / way())
    limits = samples["pinned copy, GB/s"]
    figures = [Figure(f"{name.removesuffix(', GB/s')}, median", median(v), "GB/s") for name, v in samples.items()]
    for name, values in samples.items():
        if name != "pinned copy, GB/s":
            ratio = median([ours / most for ours, most in zip(values, limits, strict=True)])
            target = TARGET if name.startswith("host on cuda-vmm") else None
            figures.append(Figure(f"{name.removesuffix(', GB/s')} / pinned copy", ratio, "ratio", target))
    return Measured(figures, samples, {"file": file.name, "bytes": size, **_pace(device)})


def cold_loads(context: Context) -> Measured:
    """From the disk, against the disk; and with a conversion, from the page cache. A file of float32."""
    nbytes = files.DRY_NBYTES if context.dry else _CONVERTED_NBYTES
    file = files.made(context.scratch, "float32", nbytes, files.DRY_TENSORS if context.dry else 800, "F32")
    size = file.stat().st_size
    device = cuda.resolve(context.device)
    gpu, pace = device_of(device), Pace.on(device).for_file(size)
    samples: Samples = {}
    notes: list[str] = []
    with clients.host(context, file, "cuda-vmm") as host:
        for _ in range(1 if context.dry else 3):
            drop(file, notes)
            limit = read(gpu, file, pace.readers, pace.block_nbytes)
            drop(file, notes)
            samples.setdefault("disk, read alone, GB/s", []).append(limit)
            samples.setdefault("load from disk, GB/s", []).append(size / 1e9 / load_by(host, file))
            samples.setdefault("load from page cache, GB/s", []).append(size / 1e9 / load_by(host, file))
            converting = functools.partial(load_by, dtype="F16")
            samples.setdefault("load to F16 from page cache, GB/s", []).append(size / 1e9 / converting(host, file))
    figures = [Figure(f"{name.removesuffix(', GB/s')}, median", median(v), "GB/s") for name, v in samples.items()]
    pairs = zip(samples["load from disk, GB/s"], samples["disk, read alone, GB/s"], strict=True)
    figures.append(Figure("load from disk / disk, read alone", median([one / two for one, two in pairs]), "ratio"))
    return Measured(figures, samples, {"file": file.name, "bytes": size, **_pace(device)}, notes)


def load_by(host: HostProcess, file: Path, dtype: str = "") -> float:
    """Seconds from the request to the host's answer; it is unloaded again."""
    began = time.perf_counter()
    reply = clients.load(host, file, dtype)
    took_s = time.perf_counter() - began
    assert not reply.was_loaded
    clients.unload(host, reply.model.name)
    return took_s


def load_here(file: Path, rung: Rung, pace: Pace | None = None) -> float:
    """Seconds from an open header to a frozen segment; the segment is freed again."""
    found = checkpoint.read(file)
    layout = loader.plan(found, ())
    began = time.perf_counter()
    loaded = loader.load(found, layout, rung, lambda done, total: None, pace)
    took_s = time.perf_counter() - began
    loaded.segment.free()
    return took_s


def _pace(device: str) -> dict[str, object]:
    pace = Pace.on(device)
    return {"pace": f"{pace.readers} readers, {pace.buffers} blocks of {pace.block_nbytes / MIB:g} MiB, "
                    f"{pace.digesters} threads for the digest"}  # fmt: skip
