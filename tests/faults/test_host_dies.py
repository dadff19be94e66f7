"""POSIX memory outlives its host: clients go on, and find the next one."""

from __future__ import annotations

import gc
import signal
from pathlib import Path

import pytest

from lunashm import protocol as p
from lunashm.client import attach, session_for
from lunashm.client.connection import Connection
from lunashm.errors import HostLost, HostUnavailable
from lunashm.memory.posix import PosixRung
from lunashm.paths import find_host
from tests import checkpoints
from tests.faults.programs import program
from tests.host_process import HostProcess
from tests.waiting import until

OUTLIVE = """
while model.attached:
    pass
say(model.checksum())
sys.stdin.readline()
again = model.reattached(30.0)
model.close()
del weights, model
gc.collect()
say([again.checksum(), again.attached])
sys.stdin.read()
"""


@pytest.fixture
def path(own_host: HostProcess) -> Path:
    path = own_host.models / "m.safetensors"
    checkpoints.write(path)
    return path


def test_killed_host_leaves_its_clients_working_and_the_next_one_takes_over(own_host: HostProcess, path: Path) -> None:
    with program(own_host, path, OUTLIVE) as other, attach(path) as model:
        session = session_for(own_host.endpoint)
        expected, weights = model.checksum(), model.state_dict()
        (segment,) = own_host.segments()
        first = session.connect().host_id

        own_host.kill()
        until(lambda: session.host is None, "the client notices")
        assert not model.attached
        assert other.hear() == expected
        assert find_host(own_host.endpoint) is None
        assert session.host is None
        assert not session.host_is_back()
        assert model.checksum() == expected
        assert weights["scale"].isfinite()
        assert segment.exists()
        with pytest.raises(HostUnavailable):
            model.reattached(1.0)

        own_host.start()
        assert not segment.exists()  # the dead host's name is reclaimed,
        assert model.checksum() == expected  # its bytes are not
        assert session.host_is_back()
        other.tell()
        again = model.reattached(30.0)
        assert (again.checksum(), again.attached, model.attached) == (expected, True, False)
        assert session.connect().host_id != first
        assert other.hear() == [expected, True]
        del weights
        model.close()
        again.close()
        del model, again
        gc.collect()
        until(lambda: own_host.leases() == 1, "only the other client's new lease is left")
    session.close()


def test_request_that_waits_fails_at_once_when_the_host_is_killed(own_host: HostProcess, path: Path) -> None:
    own_host.process.send_signal(signal.SIGSTOP)  # it will not answer
    connection = Connection(own_host.endpoint)
    future = connection.submit(p.GetStatus())
    own_host.kill()
    assert isinstance(future.exception(5), HostLost)
    connection.close()


def test_next_host_reclaims_what_the_dead_one_left_but_nothing_of_a_live_one(
    own_host: HostProcess, path: Path, host: HostProcess
) -> None:
    other = host.models / "alive.safetensors"
    checkpoints.write(other, seed=5)
    alive = attach(other, endpoint=host.endpoint.url)
    (kept,) = host.segments()
    attach(path, endpoint=own_host.endpoint.url).close()
    (left,) = own_host.segments()
    own_host.kill()
    own_host.start()
    assert not left.exists()
    assert kept.exists()
    assert left.name in own_host.log()
    alive.close()
    session_for(own_host.endpoint).close()


def test_stopped_host_leaves_nothing_behind(own_host: HostProcess, path: Path) -> None:
    with attach(path) as model:
        checksum, (segment,) = model.checksum(), own_host.segments()
        assert own_host.stop() == 0
        assert not segment.exists()
        assert model.checksum() == checksum
    assert sorted(entry.name for entry in own_host.runtime.iterdir()) == ["cpu.lock", "host.log", "models"]
    session_for(own_host.endpoint).close()


def test_host_that_is_told_to_stop_while_it_loads_stops(own_host: HostProcess) -> None:
    if PosixRung().free_nbytes() < 500 << 20:
        pytest.skip("needs 500 MB of shared memory, so that loading takes a moment")
    path = own_host.models / "large.safetensors"
    tensors = {"a": ("U8", (400 << 20,))}
    with path.open("wb") as file:
        file.write(checkpoints.header_of(tensors))
        file.truncate(file.tell() + (400 << 20))
    connection = Connection(own_host.endpoint)
    future = connection.submit(p.Load(str(path), (), 60.0))
    (segment,) = until(own_host.segments, "it loads")
    assert own_host.stop() == 0
    assert not segment.exists()
    reply = future.result(10)
    assert isinstance(reply, p.ErrorReply)
    assert reply.code == "host_lost"
    connection.close()
