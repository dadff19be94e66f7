"""A whole host and a whole client on a GPU: what ``attach()`` gives is the file, in every dtype, where it belongs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import checkpoints
from tests.contracts.rungs import PYTHON_PATH, ROOT

pytestmark = pytest.mark.gpu

SPECS = {
    "a": ("F32", (300, 1000)), "b": ("F16", (7, 5)), "c": ("BF16", (1 << 20,)), "d": ("F32", ()), "e": ("F16", (0, 3)),
    "f": ("F8_E4M3", (33,)), "g": ("F8_E5M2", (2, 2)), "h": ("I64", (3,)), "i": ("U8", (5,)), "j": ("BOOL", (4,)),
    "layer.weight": ("F32", (64, 64)), "layer.bias": ("F32", (64,)),
}  # fmt: skip
RUNGS = ["cuda-vmm", "cuda-ipc"]
_DEADLINE_S = 120


@pytest.fixture(params=RUNGS)
def rung(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def path(runtime: Path) -> Path:
    path = runtime / "m.safetensors"
    checkpoints.write(path, SPECS)
    return path


@pytest.fixture
def host(runtime: Path, path: Path, rung: str) -> Iterator[dict[str, Any]]:
    with Serving(runtime, "cuda:0", rung) as ready:
        yield ready


class Serving:
    """``lunashm serve`` as a process; its READY line."""

    def __init__(self, runtime: Path, device: str, rung: str) -> None:
        flags = ["--device", device, "--memory", rung, "--root", str(runtime), "--json"]
        environment = os.environ | {"LUNASHM_RUNTIME_DIR": str(runtime)}
        command = [sys.executable, "-m", "lunashm", "serve", *flags]
        self._process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        ready: dict[str, Any] = json.loads(self._process.stdout.readline())
        return ready

    def __exit__(self, *exc: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(20) == 0
        assert self._process.stdout is not None
        self._process.stdout.close()


def client(what: str, runtime: Path, path: Path, device: str, **variables: str) -> dict[str, Any]:
    """What ``python -m tests.gpu.attached WHAT`` says."""
    environment = os.environ | {"LUNASHM_RUNTIME_DIR": str(runtime), "PYTHONPATH": PYTHON_PATH} | variables
    command = [sys.executable, "-m", "tests.gpu.attached", what, str(path), device]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=_DEADLINE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.mark.parametrize(
    "configuration", ["backend:native", "backend:cudaMallocAsync", "expandable_segments:True"]
)  # fmt: skip
def test_attached_tensors_are_the_files(
    host: dict[str, Any], rung: str, runtime: Path, path: Path, configuration: str
) -> None:
    """As the process's first use of CUDA, under each of torch's allocators."""
    said = client("compare", runtime, path, "cuda:0", PYTORCH_CUDA_ALLOC_CONF=configuration)
    assert said == {"rungs": [rung], "devices": ["cuda:0"], "wrong": []}


def test_module_and_lora_compute_as_with_private_weights(host: dict[str, Any], runtime: Path, path: Path) -> None:
    assert client("compute", runtime, path, "cuda:0") == {"equal": True, "lora": True, "unchanged": True}


def test_model_that_is_let_go_of_during_a_capture_stays_until_after_it(
    host: dict[str, Any], runtime: Path, path: Path
) -> None:
    """The capture may be spoilt, as the driver documents; memory is not taken from under a kernel."""
    said = client("capture", runtime, path, "cuda:0")
    print(f"capture: {said}")
    assert said["gone_meanwhile"] is False
    assert said["gone_afterwards"] is True
    assert said["works"] is True


def test_second_gpu_is_attached_as_such(runtime: Path, path: Path, rung: str) -> None:
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip("gpu: this machine has one GPU")
    with Serving(runtime, "cuda:1", rung):
        said = client("compare", runtime, path, "cuda:1")
        assert (said["devices"], said["wrong"]) == (["cuda:1"], [])
        again = client("compare", runtime, path, "cuda:0", CUDA_VISIBLE_DEVICES="1")
        assert (again["devices"], again["wrong"]) == (["cuda:0"], [])
