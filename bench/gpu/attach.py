"""What attaching costs: an SDXL in a fresh process, and how it grows with the size, on each rung.

Timed from the request to a complete state dict ("ready"), and to the answer of a first kernel that reads it ("used").
The model is loaded; Python and torch are imported. In fresh processes finding the host, connecting and registering
are part of it; once with torch's context made before, as in a ComfyUI that has run a prompt, and once without.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from bench.gpu import clients, files
from bench.gpu.part import Context, Measured
from bench.host import HostProcess
from bench.report import Figure, median

SIZES_GB = (1, 2, 4, 8)
FRESH = {("cuda-vmm", True): 5, ("cuda-vmm", False): 3, ("cuda-ipc", True): 3, ("cuda-ipc", False): 2}
"""How many processes, by rung and whether there is a context before."""
REPEATS = 10
TARGET = "<= 100"

Samples = dict[str, list[float]]


def run(context: Context) -> Measured:
    sdxl = files.sdxl(context.scratch, context.dry)
    ladder = [_of_size(context, size) for size in SIZES_GB]
    figures: list[Figure] = []
    samples: Samples = {}
    try:
        for rung in clients.rungs(context):
            with clients.host(context, sdxl, rung) as host:
                for file in (sdxl, *ladder):
                    clients.load(host, file)
                fresh = _fresh(context, sdxl, host, rung, samples)
                figures += fresh
                options = {"files": [str(file) for file in (*ladder, sdxl)], "repeats": 2 if context.dry else REPEATS}
                with clients.Client(context, "attach_again", sdxl, host, options) as client:
                    found = [client.hear() for _ in options["files"]]  # type: ignore[attr-defined]
            figures += _growth(rung, found, samples)
    finally:
        for file in ladder:
            file.unlink(missing_ok=True)
    return Measured(figures, samples, {"file": sdxl.name, "tensors": files.SDXL_TENSORS if not context.dry else 0})


def _of_size(context: Context, size: int) -> Path:
    nbytes, tensors = (size << 20, files.DRY_TENSORS) if context.dry else (size * files.GB, files.SDXL_TENSORS)
    return files.made(context.scratch, f"ladder-{size}", nbytes, tensors)


def _fresh(context: Context, sdxl: Path, host: HostProcess, rung: str, samples: Samples) -> list[Figure]:
    figures = []
    for (of, with_context), times in FRESH.items():
        if of != rung:
            continue
        name = f"{rung}: SDXL in a fresh process, {'context there' if with_context else 'no context yet'}"
        for _ in range(1 if context.dry else times):
            with clients.Client(context, "first_attach", sdxl, host, {"context": with_context}) as client:
                said = client.hear()
            samples.setdefault(f"{name}, ready, ms", []).append(said["ready_ms"])
            samples.setdefault(f"{name}, used, ms", []).append(said["used_ms"])
        target = TARGET if of == "cuda-vmm" and with_context else None
        figures.append(Figure(f"{name}, ready, median", median(samples[f"{name}, ready, ms"]), "ms", target))
        figures.append(Figure(f"{name}, used, median", median(samples[f"{name}, used, ms"]), "ms", target))
    return figures


def _growth(rung: str, found: list[dict[str, object]], samples: Samples) -> list[Figure]:
    """Medians by size, and the straight line through them."""
    figures, points = [], []
    for said in found:
        nbytes, ready, used = said["nbytes"], said["ready_ms"], said["used_ms"]
        assert isinstance(nbytes, int) and isinstance(ready, list) and isinstance(used, list)
        name = f"{rung}: {nbytes / 1e9:.2f} GB, same process"
        samples[f"{name}, ready, ms"], samples[f"{name}, used, ms"] = ready, used
        figures.append(Figure(f"{name}, ready, median", median(ready), "ms"))
        points.append((nbytes / 1e9, median(ready)))
    slope, start = statistics.linear_regression([gb for gb, _ in points], [ms for _, ms in points])
    return [
        *figures,
        Figure(f"{rung}: attach, for each GB more", slope, "ms/GB"),
        Figure(f"{rung}: attach, without the bytes", start, "ms"),
    ]
