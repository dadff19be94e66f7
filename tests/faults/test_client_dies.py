"""I8: what one client does changes no byte and no result of another, and costs the host nothing."""

from __future__ import annotations

import gc
import signal
import time
from collections.abc import Iterator

import pytest

from lunashm import protocol as p
from lunashm.client import attach
from tests import checkpoints
from tests.conftest import lent
from tests.faults.programs import program
from tests.host_process import HostProcess
from tests.waiting import until


@pytest.fixture(params=["common_host", "common_memfd_host"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostProcess]:
    """On memory with a name, and on memory whose descriptors are handed over."""
    host = request.getfixturevalue(request.param)
    with lent(host, monkeypatch):
        yield host


HOLD = "sys.stdin.read()\n"

WRITE = """
sys.stdin.readline()
weights["layer0.weight"].zero_()
say("it was written")
"""

FORK = """
import os
def attempts():
    session = model._session
    yield "state_dict", model.state_dict
    yield "checksum", model.checksum
    yield "reattached", lambda: model.reattached(1.0)
    yield "attached", lambda: model.attached
    yield "host", lambda: session.host
    yield "client_id", lambda: session.client_id
    yield "host_is_back", session.host_is_back
    yield "connect", session.connect
    yield "listen", lambda: session.listen(print)
    yield "request", lambda: session.request(None)
    yield "submit", lambda: session._current.connection.submit(None)

session = model._session
session._connecting.acquire()  # some other thread of the parent was busy with it
child = os.fork()
if child == 0:
    result = {}
    for name, attempt in attempts():
        try:
            result[name] = repr(attempt())
        except errors.ForkedProcess:
            result[name] = "forked_process"
    total = sum(float(t.float().sum()) for t in weights.values())  # what was mapped stays readable
    model.close()
    del model, weights
    gc.collect()
    session.close()
    own = lunashm.client.attach(sys.argv[1])
    result["own"] = own.attached and own.checksum()
    say(result)
    sys.exit(0)  # with everything that runs at exit
session._connecting.release()
say(os.waitpid(child, 0)[1])
say(model.attached)
sys.stdin.read()
"""


def test_killed_clients_lease_is_gone_within_a_second(host: HostProcess) -> None:
    path = host.models / "killed.safetensors"
    checkpoints.write(path)
    with program(host, path, HOLD) as client:
        assert host.leases() == 1
        killed_at = time.monotonic()
        client.process.kill()
        until(lambda: host.leases() == 0, "the lease is gone", deadline_s=1.0)
        assert time.monotonic() - killed_at < 1.0
    assert host.status().counters["client.process_ended"] >= 1
    assert [model.clients for model in host.status().models] == [0]


def test_killed_holder_of_a_draining_model_frees_it(host: HostProcess) -> None:
    path = host.models / "draining.safetensors"
    checkpoints.write(path)
    with program(host, path, HOLD) as client:
        reply = host.ask(p.Unload("draining.safetensors", True))
        assert isinstance(reply, p.Unloaded)
        assert not reply.freed
        client.process.kill()
        until(lambda: host.status().models == (), "the memory is freed")


def test_writing_kills_the_writer_and_nobody_else(host: HostProcess) -> None:
    path = host.models / "written.safetensors"
    checkpoints.write(path)
    with attach(path) as witness, program(host, path, WRITE) as writer:
        before = witness.checksum()
        assert writer.checksum == before
        writer.tell()
        assert writer.end() == -signal.SIGSEGV
        assert witness.attached
        assert witness.checksum() == before
        until(lambda: host.leases() == 1, "only the witness is left")
    with attach(path) as later:
        assert later.checksum() == before


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_forked_child_is_refused_by_everything_of_its_parents_and_ends_nothing_of_it(host: HostProcess) -> None:
    path = host.models / "forked.safetensors"
    checkpoints.write(path)
    with program(host, path, FORK) as parent:
        result = parent.hear()
        assert result.pop("own") == parent.checksum
        assert result
        assert set(result.values()) == {"forked_process"}, result
        assert parent.hear() == 0  # the child's exit status
        assert parent.hear() is True
        until(lambda: host.leases() == 1, "the child's own lease is gone, the parent's is not")
        parent.tell()
    gc.collect()


def test_client_that_exits_in_order_has_left(host: HostProcess) -> None:
    path = host.models / "ordered.safetensors"
    checkpoints.write(path)
    left = host.status().counters.get("client.left", 0)
    with program(host, path, "") as client:
        assert client.end() == 0
    assert host.leases() == 0
    assert host.status().counters["client.left"] == left + 1
