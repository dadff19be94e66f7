"""The same file to the same device by loaders of others, each time in a fresh process with a context.

safetensors' own load_file to the device, load_file to RAM and then ``to()``, and fastsafetensors where it is installed.
"""

from __future__ import annotations

import importlib.util

from bench.gpu import clients, files
from bench.gpu.part import Context, Measured
from bench.gpu.reading import warm
from bench.report import Figure, median

LOADERS = ("safetensors", "safetensors, then to()", "fastsafetensors")
_PROCESSES = 3


def run(context: Context) -> Measured:
    file = files.sdxl(context.scratch, context.dry)
    samples: dict[str, list[float]] = {}
    notes: list[str] = []
    found: list[str] = []
    warm(file)
    with clients.host(context, file) as nobody:  # the clients want an address; nothing is asked of it
        for name in LOADERS:
            if name == "fastsafetensors" and importlib.util.find_spec(name) is None:
                notes.append("fastsafetensors is not installed: nothing to compare with")
                continue
            found.append(name)
        for _ in range(1 if context.dry else _PROCESSES):
            for name in list(found):
                with clients.Client(context, "load_with", file, nobody, {"loader": name}) as client:
                    said = client.hear_or_death()
                if "died" in said:
                    notes.append(f"{name} ended with {said['died']}: {said['words'].strip().splitlines()[-1:]}")
                    found.remove(name)
                else:
                    samples.setdefault(f"{name}, GB/s", []).append(said["nbytes"] / 1e9 / said["took_s"])
    figures = [Figure(f"{name.removesuffix(', GB/s')}, median", median(v), "GB/s") for name, v in samples.items()]
    return Measured(figures, samples, {"file": file.name}, notes)
