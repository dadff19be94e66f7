"""NVIDIA's Multi-Process Service: whether its daemon runs, and what it means for processes that share memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from lunashm.cli.checks.check import Check, State

_DEFAULT = Path("/tmp/nvidia-mps")  # noqa: S108 - where the daemon listens unless it is told
_DAEMON = "nvidia-cuda-mps-control"[:15]
"""/proc/PID/comm has 15 characters of a name."""


def look(proc: Path = Path("/proc"), environ: Mapping[str, str] = os.environ, default: Path = _DEFAULT) -> Check:
    pipes = Path(environ.get("CUDA_MPS_PIPE_DIRECTORY") or default)
    if (pipes / "control").exists():
        who = "a control daemon runs" if running(proc) else "a control daemon of another container, or one that ended,"
        text = (
            f"{who} at {pipes}: kernels of several processes run at the same time, and a fault of one, such as a write "
            "to shared weights, ends all of them"
        )
        fix = "where they must not harm each other: echo quit | nvidia-cuda-mps-control"
        return Check("MPS", State.WARN, text, fix)
    if running(proc):
        fix = "export CUDA_MPS_PIPE_DIRECTORY to what the daemon was started with, for hosts and clients alike"
        return Check("MPS", State.WARN, f"a control daemon runs, but not at {pipes}", fix)
    return Check("MPS", State.OK, "no control daemon: processes take turns on a GPU, and faults stay with the one")


def running(proc: Path = Path("/proc")) -> bool:
    """Whether this PID namespace has the daemon."""
    return any(_name(process) == _DAEMON for process in proc.glob("[0-9]*"))


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return ""
