"""``top`` with a host on a GPU: the stand-in driver, and the stand-in for NVML."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest

from tests.standin.build import environment
from tests.standin.peers import GPUS
from tests.waiting import until

from .conftest import ROOT, SERVE, large

TOP = ["-m", "lunashm", "top"]


@pytest.fixture
def gpu_host(runtime, tmp_path):
    command = [sys.executable, *SERVE, "--root", str(tmp_path), "--device", "cuda:1"]
    variables = environment(LUNASHM_RUNTIME_DIR=str(runtime))
    process = subprocess.Popen(command, env=variables, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert json.loads(process.stdout.readline())["device"] == GPUS[1]
    yield process
    process.terminate()
    process.wait(20)
    process.stdout.close()


def look(runtime, nvml=True, **said):
    """``top --json`` on the stand-ins."""
    variables = {f"LUNASHM_STANDIN_NVML_{name}": value for name, value in said.items()}
    done = subprocess.run(
        [sys.executable, *TOP, "--json"], cwd=ROOT, capture_output=True, text=True, check=True,
        env=environment(nvml=nvml, LUNASHM_RUNTIME_DIR=str(runtime), **variables),
    )  # fmt: skip
    (host,) = json.loads(done.stdout)["hosts"]
    return host


GPU_CLIENT = """
import sys
from lunashm.client.session import session_for
from lunashm.paths import Endpoint
session = session_for(Endpoint.for_device(sys.argv[1]), kind="test", label="on a GPU")
held = session.attach(sys.argv[2], (), 60.0)
print("attached", flush=True)
sys.stdin.read()
"""


def test_a_gpus_memory_is_that_of_the_hosts_device(gpu_host, runtime, tmp_path):
    path = large(tmp_path / "large.safetensors")
    command = [sys.executable, "-c", GPU_CLIENT, GPUS[1], str(path)]
    variables = environment(LUNASHM_RUNTIME_DIR=str(runtime))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    client = subprocess.Popen(command, env=variables, cwd=ROOT, text=True, **pipes)
    try:
        assert client.stdout.readline() == "attached\n"
        listed = f"0:{gpu_host.pid}=1,1:{gpu_host.pid}=600000000,1:{client.pid}=-1"
        host = look(runtime, USED="0=111,1=5000000000", PROCESSES=listed)
    finally:
        client.communicate("")
    device = host["device"]
    assert (device["used_nbytes"], device["total_nbytes"], device["delta_nbytes"]) == (5 * 10**9, 80 * 10**9, 0)
    assert host["weights_nbytes"] >= 40_000_000
    assert device["beyond_nbytes"] == 5 * 10**9 - host["weights_nbytes"]
    own, other = host["processes"]
    assert (own["nvml_nbytes"], own["peak_nbytes"], own["unseen"]) == (600_000_000, 600_000_000, "")
    assert (other["nvml_nbytes"], other["unseen"]) == (None, "NVML has no figure for it")
    assert (other["shared_nbytes"], other["models"]) == (40_000_000, ["large.safetensors"])
    assert host["ram"] is None


@pytest.mark.parametrize(
    ("nvml", "said", "reason"),
    [(False, {}, "libnvidia-ml.so.1"), (True, {"FAIL": "nvmlInitWithFlags=9"}, "Driver Not Loaded")],
)
def test_a_gpu_without_nvml_is_shown_with_the_reason(gpu_host, runtime, nvml, said, reason):
    host = look(runtime, nvml, **said)
    assert (host["state"], host["device"]) == ("up", None)
    assert reason in host["unseen"]


def test_the_device_is_compared_with_what_it_had_before_the_host_came(runtime, tmp_path, terminal):
    """And what is the same all the time is 0."""
    variables = environment(nvml=True, LUNASHM_STANDIN_NVML_USED="1=5000000000", LUNASHM_RUNTIME_DIR=str(runtime))
    del variables["PYTHONPATH"]
    top = terminal(runtime, "--interval", "0.1", columns=100, **variables)
    until(lambda: "lunashm serve" in top.read(), "it watches")
    began = time.time()
    command = [*SERVE, "--root", str(tmp_path), "--device", "cuda:1"]
    variables = environment(LUNASHM_RUNTIME_DIR=str(runtime))
    host = subprocess.Popen([sys.executable, *command], env=variables, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        host.stdout.readline()
        until(lambda: "beyond the shared weights" in top.read(), "the device is shown")
        since = re.search(r"\+0 B since (\d\d:\d\d:\d\d), 5.00 GB beyond", top.read())
        assert since, top.read()
        assert since[1] <= time.strftime("%H:%M:%S", time.localtime(began))
    finally:
        host.terminate()
        host.wait(20)
        host.stdout.close()
    assert top.end()[0] == 0
