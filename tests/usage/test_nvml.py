"""The real pynvml on a stand-in for NVML, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lunashm.usage import Unseen
from lunashm.usage.nvml import GpuMemory
from tests.host_process import ROOT
from tests.standin.peers import GPUS
from tests.standin.process import Process

USED, PROCESSES, FAIL = (f"LUNASHM_STANDIN_NVML_{name}" for name in ("USED", "PROCESSES", "FAIL"))
SETUP = """
import os
from lunashm.usage.nvml import Nvml
nvml = Nvml()

def say(name, value):
    os.environ[name] = value
"""


@pytest.fixture
def machine() -> Iterator[Process]:
    """A process with ``nvml``, and ``say`` for what the stand-in is to answer from then on."""
    with Process(nvml=True, **{USED: "0=5000000000,1=7", PROCESSES: "0:41=1000,0:42=-1,1:43=9"}) as process:
        process(SETUP)
        yield process


def test_devices_are_told_apart_by_uuid_and_have_their_own_processes(machine: Process) -> None:
    assert machine("nvml.uuids()") == GPUS
    first = machine("nvml.memory(uuid)", uuid=GPUS[0])
    assert first == GpuMemory(5_000_000_000, 80_000_000_000, {41: 1000, 42: None})
    assert machine("nvml.memory(uuid)", uuid=GPUS[1]) == GpuMemory(7, 80_000_000_000, {43: 9})


def test_what_changes_is_seen_at_the_next_look(machine: Process) -> None:
    machine("say(name, '0=6')", name=USED)
    machine("say(name, '')", name=PROCESSES)
    assert machine("nvml.memory(uuid)", uuid=GPUS[0]) == GpuMemory(6, 80_000_000_000, {})


def test_gpu_that_nvml_does_not_know_is_unseen(machine: Process) -> None:
    assert machine("nvml.memory('GPU-ffffffff-0000-4000-8000-000000000000')") == Unseen("NVML: Not Found")


@pytest.mark.parametrize(
    ("call", "error", "reason"),
    [
        ("nvmlInitWithFlags", 9, "NVML: Driver Not Loaded"),
        ("nvmlInitWithFlags", 18, "NVML: RM has detected an NVML/RM version mismatch."),
        ("nvmlDeviceGetHandleByUUID", 4, "NVML: Insufficient Permissions"),
        ("nvmlDeviceGetMemoryInfo", 3, "NVML: Not Supported"),
        ("nvmlDeviceGetMemoryInfo", 15, "NVML: GPU is lost"),
        ("nvmlDeviceGetMemoryInfo", 777, "NVML: an error of the stand-in"),
    ],
)
def test_failure_is_a_reason_and_the_next_look_tries_again(
    machine: Process, call: str, error: int, reason: str
) -> None:
    machine("say(name, value)", name=FAIL, value=f"{call}={error}")
    assert machine("nvml.memory(uuid)", uuid=GPUS[1]) == Unseen(reason)
    machine("say(name, '')", name=FAIL)
    assert machine("nvml.memory(uuid)", uuid=GPUS[1]) == GpuMemory(7, 80_000_000_000, {43: 9})


def test_device_is_shown_where_only_its_processes_are_not(machine: Process) -> None:
    machine("say(name, 'nvmlDeviceGetComputeRunningProcesses_v3=3')", name=FAIL)
    found = machine("nvml.memory(uuid)", uuid=GPUS[1])
    assert found == GpuMemory(7, 80_000_000_000, Unseen("NVML: Not Supported"))


def test_closing_gives_the_library_back_and_asking_again_takes_it(machine: Process) -> None:
    machine("nvml.uuids(); nvml.close(); nvml.close()")
    assert machine("import pynvml; pynvml._nvmlLib_refcount") == 0
    assert machine("nvml.uuids()") == GPUS
    assert machine("pynvml._nvmlLib_refcount") == 1


@pytest.mark.skipif(
    subprocess.run(
        [sys.executable, "-c", "import ctypes; ctypes.CDLL('libnvidia-ml.so.1')"], capture_output=True, check=False
    ).returncode == 0,
    reason="this machine has NVIDIA's library",
)  # fmt: skip
def test_machine_without_nvml_is_told_where_it_comes_from() -> None:
    code = "from lunashm.usage.nvml import Nvml; n = Nvml(); print(n.memory('GPU-x').reason); print(n.uuids().reason)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["NVML (libnvidia-ml.so.1) is not installed; it comes with NVIDIA's driver"] * 2


def test_nothing_is_imported_before_it_is_asked() -> None:
    code = "import sys, lunashm.cli; sys.exit('pynvml' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
