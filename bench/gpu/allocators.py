"""Mapped memory under each of torch's allocators, on each rung: address, kernels, record_stream, graph capture."""

from __future__ import annotations

from typing import Any

from bench.gpu import clients, files
from bench.gpu.part import Context, Measured
from bench.report import Figure

ALLOCATORS = {
    "native": "backend:native",
    "async": "backend:cudaMallocAsync",
    "expandable": "expandable_segments:True",
}
_MUST = ("pointer inside the mapping", "kernel reads what a copy has", "side stream computed the same")
"""What has to be so for a shared model to be used at all; streams and graphs are facts to know."""


def run(context: Context) -> Measured:
    facts: dict[str, Any] = {}
    good: list[float] = []
    nbytes, tensors = (files.DRY_NBYTES, files.DRY_TENSORS) if context.dry else (files.GB // 4, 400)
    file = files.made(context.scratch, "small", nbytes, tensors)
    for rung in clients.rungs(context):
        with clients.host(context, file, rung) as host:
            for name, configuration in list(ALLOCATORS.items())[1 if context.dry else 0 :][: 1 if context.dry else 3]:
                variables = {"PYTORCH_CUDA_ALLOC_CONF": configuration}
                with clients.Client(context, "allocator", file, host, variables=variables) as client:
                    said = client.hear_or_death()
                facts[f"{rung}, {name}"] = said
                good.append(float(all(said.get(fact) is True for fact in _MUST)))
    figures = [Figure("rungs and allocators that work together", sum(good), f"of {len(good)}", f">= {len(good)}")]
    return Measured(figures, {"works": good}, facts)
