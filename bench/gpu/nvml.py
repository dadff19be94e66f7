"""What NVML counts for shared memory: the whole device, and each process, at every stage of a host and two clients.

A stage differs from the one before by one thing: a host, a load, a context, an attach. Asked from a process without
a context of its own.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from bench.gpu import clients, files
from bench.gpu.part import Context, Measured
from bench.report import Figure
from lunashm.memory import cuda
from lunashm.usage import Unseen
from lunashm.usage.nvml import Nvml

MB = 10**6
NBYTES = 4 * files.GB


def run(context: Context) -> Measured:
    facts: dict[str, Any] = {}
    figures: list[Figure] = []
    nbytes, tensors = (files.DRY_NBYTES, files.DRY_TENSORS) if context.dry else (NBYTES, 1000)
    file = files.made(context.scratch, "nvml", nbytes, tensors)
    try:
        for rung in clients.rungs(context):
            stages = _stages(context, file, rung)
            facts |= {f"{rung}: {name}": found for name, found in stages.items()}
            used = {name: found["used"] for name, found in stages.items() if "used" in found}
            for name, before, after in _STEPS:
                if before in used and after in used:
                    figures.append(Figure(f"{rung}: {name}, whole device", (used[after] - used[before]) / MB, "MB"))
    finally:
        file.unlink(missing_ok=True)
    note = f"the model has {nbytes / 1e9:.3f} GB; figures of single processes are among the facts, by pid"
    return Measured(figures, {}, facts, [note])


_STEPS = (
    ("host alone", "nothing", "host"),
    ("model loaded", "host", "loaded"),
    ("context of a client", "loaded", "context 1"),
    ("first client attached", "context 1", "attached 1"),
    ("context of another", "attached 1", "context 2"),
    ("second client attached", "context 2", "attached 2"),
    ("both let go", "closed", "attached 2"),
)


def _stages(context: Context, file: Any, rung: str) -> dict[str, dict[str, Any]]:  # noqa: ANN401
    stages: dict[str, dict[str, Any]] = {}
    nvml = Nvml()
    uuid = cuda.resolve(context.device)  # initialises the driver here, and makes no context

    def look(stage: str, pids: dict[str, int]) -> None:
        found = nvml.memory(uuid)
        if isinstance(found, Unseen):
            stages[stage] = {"unseen": found.reason}
            return
        listed = found.processes
        named = listed.reason if isinstance(listed, Unseen) else {who: listed.get(pid) for who, pid in pids.items()}
        others = "" if isinstance(listed, Unseen) else {str(pid): used for pid, used in listed.items()}
        stages[stage] = {"used": found.used, "processes": named, "all listed": others}

    look("nothing", {})
    with ExitStack() as stack:
        host = stack.enter_context(clients.host(context, file, rung))
        pids = {"host": host.pid}
        look("host", pids)
        clients.load(host, file)
        look("loaded", pids)
        holders = []
        for number in (1, 2):
            holder = stack.enter_context(clients.Client(context, "hold", file, host))
            holders.append(holder)
            pids[f"client {number}"] = holder.pid
            holder.hear()
            look(f"context {number}", pids)
            holder.tell()
            holder.hear()
            look(f"attached {number}", pids)
        for holder in holders:
            holder.tell()
            holder.hear()
        look("closed", pids)
    nvml.close()
    return stages
