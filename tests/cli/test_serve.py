"""The host as a process: how it starts, who else may, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

import lunashm.client
from lunashm.cli import control, exits
from lunashm.cli.serve import gpus_there
from lunashm.paths import Endpoint, HostLock
from lunashm.protocol import HostInfo

from .conftest import Program, checkpoint

SERVE = ["-m", "lunashm", "serve"]


@pytest.fixture
def host(runtime, tmp_path):
    program = Program([*SERVE, "--root", str(tmp_path), "--json"], runtime).start()
    yield program
    program.end()


def test_from_ready_to_stop(host, cli, runtime, tmp_path):
    ready = json.loads(host.ready)
    assert ready["pid"] == host.process.pid
    assert ready["endpoint"] == f"ipc://{runtime}/cpu.sock"
    assert (ready["device"], ready["rung"], ready["roots"]) == ("cpu", "posix", [str(tmp_path)])

    second = cli("serve", "--json")
    assert second.code == exits.SERVING
    assert second.json["error"]["code"] == "already_serving"
    assert f"pid {host.process.pid} " in second.json["error"]["message"]

    empty = cli("ps")
    assert empty.code == 0
    assert "no models are loaded" in empty.out

    stopped = cli("stop", "--json")
    assert stopped.json == {"stopped": True, "pid": host.process.pid, "endpoint": ready["endpoint"]}
    assert host.process.wait(0) == 0, "stop returns when the process is gone"
    assert cli("ps").code == exits.NO_HOST
    assert cli("stop").code == exits.NO_HOST
    assert "Traceback" not in host.log.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_cleanly(runtime, tmp_path, number):
    host = Program([*SERVE, "--root", str(tmp_path)], runtime).start()
    expected = (
        f"READY endpoint=ipc://{runtime}/cpu.sock device=cpu rung=posix pid={host.process.pid} roots={tmp_path}\n"
    )
    assert host.ready == expected
    assert host.end(number) == 0
    assert "Traceback" not in host.log.read_text()
    assert not (runtime / "cpu.sock").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [(["--root", "/nowhere/at/all"], "/nowhere/at/all"), (["--device", "gpu"], "gpu"), (["--memory", "clay"], "memory"),
     (["--endpoint", "tcp://0.0.0.0:1"], "tcp://"), (["--log-level", "loud"], "log_level"),
     (["--ttl", "0"], "lease_ttl_s")],
)  # fmt: skip
def test_a_flag_that_makes_no_sense_is_named(cli, tmp_path, flags, named):
    result = cli("serve", "--json", *flags)
    assert result.code == exits.USAGE
    assert named in result.json["error"]["message"]


def test_stop_gives_up_at_its_deadline(runtime):
    """The lock is held by this very process, which will not go away."""
    endpoint = Endpoint.for_device("cpu")
    info = HostInfo("1", os.getpid(), 0, "cpu", "cpu", "posix", "", endpoint.url, "0", (), 0.0)
    lock = HostLock(endpoint)
    lock.acquire()
    try:
        lock.publish(info)
        assert not control._gone(endpoint, info, None, deadline=0.0)
    finally:
        lock.release()
    assert control._gone(endpoint, info, None, deadline=0.0)


OUTLIVE = """
import sys, lunashm.client
with lunashm.client.attach(sys.argv[1]) as model:
    before = model.checksum()
    print(before, flush=True)
    while model.attached:
        pass
    print(model.checksum() == before, flush=True)
    sys.stdin.readline()
    with model.reattached(30.0) as again:
        print(again.attached and again.checksum() == before, flush=True)
"""


def test_memory_without_a_name_is_served_and_outlives_its_host(cli, runtime, tmp_path):
    serve = [*SERVE, "--root", str(tmp_path), "--json", "--memory", "memfd"]
    path = checkpoint(tmp_path / "m.safetensors")
    host = Program(serve, runtime).start()
    assert json.loads(host.ready)["rung"] == "memfd"
    assert cli("load", path, "--json").json["model"]["rung"] == "memfd"
    with lunashm.client.attach(path) as model:
        own = model.checksum()
        assert {name: t.flatten().tolist() for name, t in model.state_dict().items()} == {
            name: t.flatten().tolist() for name, t in load_file(path).items()
        }
    client = Program(["-c", OUTLIVE, str(path)], runtime).start()
    assert client.ready.strip() == own
    host.end(signal.SIGKILL)
    assert client.process.stdout.readline().strip() == "True", client.log.read_text()
    host = Program(serve, runtime).start()
    client.process.stdin.write("\n")
    client.process.stdin.flush()
    assert client.process.stdout.readline().strip() == "True", client.log.read_text()
    assert client.process.wait(20) == 0
    client.end()
    assert host.end() == 0
    lunashm.client.session_for(Endpoint.for_device("cpu")).close()


@pytest.mark.parametrize(("limits", "then"), [((256, 4096), 4096), ((8000, 8000), 8000), ((256, 1 << 14), 1 << 14)])
def test_host_may_open_as_many_files_as_it_is_allowed_to(limits, then):
    """ZeroMQ ends a process that has no descriptor left for a client."""
    code = f"""
import resource
from lunashm.cli.serve import allow_descriptors
resource.setrlimit(resource.RLIMIT_NOFILE, {limits})
print(allow_descriptors(), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [str(then)] * 2


def test_a_host_of_ram_knows_of_gpus_by_what_the_driver_lists(tmp_path):
    assert not gpus_there(tmp_path / "none") and not gpus_there(tmp_path)
    (tmp_path / "0000:01:00.0").mkdir()
    assert gpus_there(tmp_path)
