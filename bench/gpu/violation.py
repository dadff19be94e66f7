"""A client writes where it may only read, on ``cuda-vmm``: what becomes of it, and whether anybody else notices.

Three ways to write, each in a process of its own, while another client and the host live: a kernel of torch's, the
driver's copy, the driver's memset.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from bench.gpu import clients, files
from bench.gpu.part import Context, Measured
from bench.report import Figure

WAYS = ("kernel", "copy", "memset")


def run(context: Context) -> Measured:
    facts: dict[str, Any] = {}
    unharmed: list[float] = []
    stopped: list[float] = []
    before_xid = _xids()
    nbytes, tensors = (files.DRY_NBYTES, files.DRY_TENSORS) if context.dry else (files.GB // 4, 400)
    file = files.made(context.scratch, "small", nbytes, tensors)
    with clients.host(context, file, "cuda-vmm") as host, clients.Client(context, "look", file, host) as bystander:
        before = bystander.hear()
        for way in WAYS:
            with clients.Client(context, "write", file, host, {"way": way}) as writer:
                writer.hear()
                writer.tell()
                outcome = writer.hear_or_death()
            facts[f"{way}: the writer"] = outcome
            stopped.append(float("died" in outcome or bool(outcome["raised"])))
            bystander.tell()
            after = bystander.hear_or_death()
            unharmed.append(float(after == before))
            if not unharmed[-1]:
                facts[f"{way}: the bystander"] = {"before": before, "after": after}
                break
        with clients.Client(context, "look", file, host) as newcomer:
            fresh = newcomer.hear_or_death()
        facts["a client that comes afterwards"] = "the same bytes" if fresh == before else fresh
        facts["host"] = "alive" if _alive(host.pid) else host.log.read_text()[-1500:]
    after_xid = _xids()
    facts["kernel log (Xid)"] = [line for line in after_xid if line not in before_xid] or after_xid[-1:]
    of, every = f"of {len(WAYS)}", f">= {len(WAYS)}"
    figures = [
        Figure("writes after which others go on with the same bytes", sum(unharmed), of, every),
        Figure("writes that the writer was stopped at or told of", sum(stopped), of),
    ]
    return Measured(figures, {"others unharmed": unharmed, "writer stopped": stopped}, facts)


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def _xids() -> list[str]:
    """The driver's complaints in the kernel's log, where this user may read it."""
    try:
        done = subprocess.run(["dmesg"], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return [f"dmesg cannot be asked: {exc}"]
    if done.returncode:
        return [f"dmesg cannot be asked: {done.stderr.strip()}"]
    return [line for line in done.stdout.splitlines() if "Xid" in line]
