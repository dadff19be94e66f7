"""What processes and devices use right now, as the kernel and NVML tell it. Changes nothing; loads no torch, no CUDA.

    ram.py      one process's memory, from /proc
    meter.py    that of all processes of a host, without asking the kernel for more than it gives cheaply
    nvml.py     one GPU's memory, from NVIDIA's management library
    history.py  what was seen before: peaks, and where a GPU stood when the watching began
    account.py  both, put beside what a host says of its models and clients
    watch.py    one watching, which uses all of these

A figure that cannot be had is an ``Unseen`` with its reason: never a zero, never an error.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unseen:
    """``reason``: why a figure is missing, for people."""

    reason: str


@dataclass(frozen=True)
class ProcessId:
    """A process as it calls itself; ``start_ticks`` tells it from a later one of that pid, 0 is not compared."""

    pid: int
    pid_namespace: int
    start_ticks: int = 0


__all__ = ["ProcessId", "Unseen"]
