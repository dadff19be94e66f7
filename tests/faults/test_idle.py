"""A host that has nothing to do does nothing. A loose bound against spinning; bench/idle.py has the figure."""

from __future__ import annotations

import threading
from pathlib import Path

import psutil

from lunashm.client import Session
from tests import checkpoints
from tests.host_process import HostProcess

INTERVAL_S = 2.0


def test_idle_host_with_idle_clients_does_not_spin(host: HostProcess) -> None:
    path = Path(host.models / "idle.safetensors")
    checkpoints.write(path)
    sessions = [Session(host.endpoint, kind="test", label=str(number)) for number in range(4)]
    held = [session.attach(str(path), (), 60.0) for session in sessions]
    process = psutil.Process(host.pid)
    cpu, switches = process.cpu_times(), process.num_ctx_switches()
    threading.Event().wait(INTERVAL_S)  # the interval is what is measured
    used = sum(process.cpu_times()[:2]) - sum(cpu[:2])
    woken = process.num_ctx_switches().voluntary - switches.voluntary
    del held
    for session in sessions:
        session.close()
    assert used < 0.1 * INTERVAL_S
    assert woken < 100 * INTERVAL_S
