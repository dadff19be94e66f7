"""What a client sees of its mapping when the host was killed, on each rung: exact errors, or whose bytes.

First at once, then when another process has taken and overwritten what is free on the device. In the product nobody
reads memory that died with its host (``lunashm/client/watch.py``); here it is read on purpose.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from bench.gpu import clients, files
from bench.gpu.part import Context, Measured
from bench.report import Figure
from lunashm.memory import ON_GPU

GIB = 1 << 30


def run(context: Context) -> Measured:
    facts: dict[str, Any] = {}
    samples: dict[str, list[float]] = {}
    nbytes, tensors = (files.DRY_NBYTES, files.DRY_TENSORS) if context.dry else (files.GB, 400)
    file = files.made(context.scratch, "small", nbytes, tensors)
    for rung in ON_GPU:
        said = _one(context, file, rung)
        noticed = said[1].pop("noticed_ms", None) if len(said) > 1 else None
        if noticed is not None:
            samples[f"{rung}: loss noticed by a client that asks, ms"] = [noticed]
        stages = ("attached", "host killed", "read at once", "read when memory was taken", "let go")
        facts |= {f"{rung}: {stage}": words for stage, words in zip(stages, said, strict=False)}
    vmm = [facts.get(f"cuda-vmm: {stage}", {}) for stage in ("read at once", "read when memory was taken")]
    reads = [outcome for words in vmm for way in ("driver copy", "kernel") for outcome in words.get(way, {"none": 1})]
    stayed = float(set(reads) == {"same"})
    figures = [Figure("cuda-vmm: bytes stay after the host's death (1: all reads)", stayed, "yes/no", ">= 1")]
    figures += [Figure(name.removesuffix(", ms"), values[0], "ms") for name, values in samples.items()]
    return Measured(figures, samples, facts)


def _one(context: Context, file: Any, rung: str) -> list[Any]:  # noqa: ANN401
    """What the client said at each stage; it ends where the client ended."""
    options = {"nbytes": 256 << 20, "reads": 3 if context.dry else 10}
    taking = {"leave": 2 * GIB, "most": 128 * GIB, "chunk": GIB // 2}
    if context.dry:
        taking = {"leave": 0, "most": 8 << 20, "chunk": 4 << 20}
    with clients.host(context, file, rung) as host, clients.Client(context, "death", file, host, options) as client:
        said = [client.hear()]
        os.kill(host.pid, signal.SIGKILL)
        host.stop()  # reaped: its memory is the driver's again
        client.tell()
        said.append(client.hear_or_death())
        client.tell()
        said.append(client.hear_or_death())
        with clients.Client(context, "fill", file, host, taking) as other:
            taken = other.hear_or_death()
            client.tell()
            said.append({**_as_dict(client.hear_or_death()), "taken by another": taken})
        client.tell()
        said.append(client.hear_or_death())
    return said


def _as_dict(said: Any) -> dict[str, Any]:  # noqa: ANN401
    return said if isinstance(said, dict) else {"said": said}
