"""Descriptors are for whom they were meant, and come or fail whole: other processes, other users, deaths, no room."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from lunashm import errors
from lunashm.client import Session, handover
from lunashm.client.connection import Connection
from lunashm.host.handover import PATIENCE_S
from lunashm.memory import rung_for
from lunashm.paths import Endpoint
from tests import checkpoints
from tests.client.test_session import AS_STORED, leases
from tests.descriptors import fetched, generation_of_many, granted, mapped, open_files
from tests.faults.programs import child
from tests.host_process import HostProcess, started
from tests.hosting import Hosting
from tests.waiting import until

NOBODY = 65534

PRELUDE = """
import json, os, resource, sys
from pathlib import Path
from lunashm import errors
from lunashm import protocol as p
from lunashm.client import handover
from lunashm.client.connection import Connection
from lunashm.paths import Endpoint
from tests.descriptors import fetched, granted, open_files

endpoint = Endpoint.parse(sys.argv[1])

def say(value):
    print(json.dumps(value), flush=True)

def attempt(ticket):
    try:
        return fetched(endpoint, ticket)
    except errors.LunashmError as exc:
        return [exc.code, exc.message]
"""

REDEEM = "say(attempt(bytes.fromhex(sys.argv[2])))\n"

SETUID = f"""
if os.getuid() == 0:
    os.setgroups([])
    os.setgid({NOBODY})
    os.setuid({NOBODY})
"""

ATTACH = """
connection = Connection(endpoint)
attached = granted(connection, Path(sys.argv[2]))
say(attached.ticket.hex())
sys.stdin.readline()
say(attempt(attached.ticket))
sys.stdin.read()
"""


@pytest.fixture
def hosting(tmp_path: Path) -> Iterator[Hosting]:
    hosting = Hosting(tmp_path, rung=rung_for("memfd", "cpu"))
    hosting.start()
    yield hosting
    hosting.stop()


@pytest.fixture
def connection(hosting: Hosting) -> Iterator[Connection]:
    with hosting.client() as connection:
        yield connection


@pytest.fixture
def path(hosting: Hosting) -> Path:
    checkpoints.write(hosting.root / "m.safetensors")
    return hosting.root / "m.safetensors"


@pytest.fixture
def memfd_host(runtime: Path) -> Iterator[HostProcess]:
    """A host process that the test may kill, with one small model."""
    (runtime / "models").mkdir()
    checkpoints.write(runtime / "models" / "m.safetensors")
    with started(runtime, runtime / "models", rung="memfd") as host:
        yield host


def model(host: HostProcess) -> Path:
    return host.models / "m.safetensors"


# -- whose ticket ------------------------------------------------------------------------------------------------------


def test_ticket_in_another_process_is_refused_and_stays_good_for_its_owner(
    hosting: Hosting, connection: Connection, path: Path, runtime: Path
) -> None:
    ticket = granted(connection, path).ticket
    with child(runtime, PRELUDE + REDEEM, hosting.endpoint.url, ticket.hex()) as thief:
        code, message = thief.hear()
        assert code == "ticket_refused"
        assert f"is pid {os.getpid()}'s, not pid {thief.process.pid}'s; attach in the process" in message
    assert hosting.counters()["error.ticket_refused"] == 1
    assert fetched(hosting.endpoint, ticket) == 1


def test_ticket_of_another_client_is_refused_here_and_stays_good_there(
    hosting: Hosting, path: Path, runtime: Path
) -> None:
    with child(runtime, PRELUDE + ATTACH, hosting.endpoint.url, str(path)) as owner:
        ticket = bytes.fromhex(owner.hear())
        with pytest.raises(errors.TicketRefused, match="attach in the process"):
            handover.redeem(hosting.endpoint, ticket)
        owner.tell()
        assert owner.hear() == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_ticket_in_a_forked_child_is_refused(hosting: Hosting, connection: Connection, path: Path) -> None:
    ticket = granted(connection, path).ticket
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            handover.redeem(hosting.endpoint, ticket)
        except errors.TicketRefused:
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert fetched(hosting.endpoint, ticket) == 1


@pytest.mark.skipif(os.getuid() != 0, reason="only root can start a process of another user")
def test_another_user_is_refused_by_the_host_itself(
    hosting: Hosting, connection: Connection, path: Path, runtime: Path
) -> None:
    """What keeps others out before that, the modes of directory and socket, is taken away."""
    ticket = granted(connection, path).ticket
    with child(runtime, PRELUDE + "say(0); sys.stdin.readline()\n" + SETUID + REDEEM,
               hosting.endpoint.url, ticket.hex()) as stranger:  # fmt: skip
        stranger.hear()
        runtime.chmod(0o755)
        hosting.endpoint.fds_path.chmod(0o666)
        stranger.tell()
        code, message = stranger.hear()
        assert code == "ticket_refused"
        assert f"serves uid 0, not uid {NOBODY}" in message
        assert stranger.end() == 0
    assert hosting.counters()["error.ticket_refused"] == 1
    assert fetched(hosting.endpoint, ticket) == 1


# -- deaths ------------------------------------------------------------------------------------------------------------


def test_client_that_dies_with_a_ticket_takes_it_along(hosting: Hosting, path: Path, runtime: Path) -> None:
    with child(runtime, PRELUDE + ATTACH, hosting.endpoint.url, str(path)) as owner:
        ticket = bytes.fromhex(owner.hear())
        before = open_files()
        owner.process.kill()
        until(lambda: leases(hosting) == 0, "its lease ends")
    assert len(hosting.server.service._tickets) == 0
    with pytest.raises(errors.TicketRefused, match="no such ticket"):
        handover.redeem(hosting.endpoint, ticket)
    assert open_files() < before  # the host's pidfd of it, and the pipes to it


@pytest.mark.parametrize("successor", [False, True])
def test_host_that_dies_between_lease_and_descriptors_is_an_error_or_its_successor_serves(
    memfd_host: HostProcess, monkeypatch: pytest.MonkeyPatch, successor: bool
) -> None:
    session, redeem, doomed = Session(memfd_host.endpoint, kind="test", label=""), handover.redeem, [True]

    def too_late(endpoint: Endpoint, ticket: bytes) -> list[int]:
        if doomed:
            doomed.pop()
            memfd_host.kill()
            if successor:
                memfd_host.start()
        return redeem(endpoint, ticket)

    session.connect()
    before = mapped()
    monkeypatch.setattr(handover, "redeem", too_late)
    if not successor:
        with pytest.raises(errors.HostLost, match="lunashm serve"):
            session.attach(str(model(memfd_host)), AS_STORED, 60.0)
        assert mapped() == before
        memfd_host.start()
    mappings = session.attach(str(model(memfd_host)), AS_STORED, 60.0)[1]
    assert mapped() == before + 1
    assert (memfd_host.leases(), session.epoch) == (1, 2)
    del mappings
    until(lambda: memfd_host.leases() == 0, "the lease ends")
    session.close()


def test_host_that_is_killed_while_a_client_waits_fails_it_at_once(
    memfd_host: HostProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, redeem = Session(memfd_host.endpoint, kind="test", label=""), handover.redeem

    def patient(endpoint: Endpoint, ticket: bytes) -> list[int]:
        memfd_host.process.send_signal(signal.SIGSTOP)
        return redeem(endpoint, ticket, 60.0)

    monkeypatch.setattr(handover, "redeem", patient)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(session.attach, str(model(memfd_host)), AS_STORED, 60.0)
        until(lambda: waiting(memfd_host.endpoint), "it waits for the host's answer")
        memfd_host.kill()
        assert isinstance(future.exception(5), errors.HostLost)
    session.close()
    memfd_host.start()


# -- no descriptors left -----------------------------------------------------------------------------------------------

LIMITED = """
connection = Connection(endpoint)
attached = granted(connection, Path(sys.argv[2]))
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
for room in (0, 1, 2, 50, 150):
    before = open_files() - 1  # less the one that counts them
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + room, hard))
    outcome = attempt(granted(connection, Path(sys.argv[2])).ticket)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    say([room, outcome, open_files() - 1 - before])
say(attempt(attached.ticket))
"""


def test_client_without_room_for_all_descriptors_keeps_none_and_says_so(
    hosting: Hosting, path: Path, runtime: Path
) -> None:
    hosting.server.service._arena.add(generation_of_many(hosting.rung, path, 200))
    with child(runtime, PRELUDE + LIMITED, hosting.endpoint.url, str(path)) as client:
        for room in (0, 1, 2, 50, 150):
            tried, (code, message), left = client.hear()
            assert (tried, code, left) == (room, "shared_memory", 0)
            assert "ulimit -n" in message
        assert client.hear() == 200  # nothing is wrong with it but its limit


def test_host_without_a_descriptor_to_accept_with_waits_quietly_and_goes_on(memfd_host: HostProcess) -> None:
    with closing(Connection(memfd_host.endpoint)) as connection, ThreadPoolExecutor(1) as pool:
        ticket = granted(connection, model(memfd_host)).ticket
        process = psutil.Process(memfd_host.pid)
        limit = resource.prlimit(memfd_host.pid, resource.RLIMIT_NOFILE)
        used_before = sum(process.cpu_times()[:2])
        none_left = open_files(memfd_host.pid) - 4  # one that it closes meanwhile must not help
        resource.prlimit(memfd_host.pid, resource.RLIMIT_NOFILE, (none_left, limit[1]))
        future = pool.submit(fetched, memfd_host.endpoint, ticket)
        until(lambda: "ulimit -n" in memfd_host.log(), "the host says so")
        threading.Event().wait(2.5)  # the interval is what is measured: two more attempts to accept
        used = sum(process.cpu_times()[:2]) - used_before
        resource.prlimit(memfd_host.pid, resource.RLIMIT_NOFILE, limit)
        assert future.result(10) == 1
        assert used < 0.3
        assert memfd_host.log().count("ulimit -n") == 1
        assert memfd_host.status().counters["dropped.accepts"] <= 5


IN_FLIGHT = """
import array, socket, tempfile, threading
from collections import Counter
from lunashm.host.handover import Handover
counters, stop = Counter(), threading.Event()
""" + SETUID + """
endpoint = Endpoint.parse("ipc://" + tempfile.mkdtemp(prefix="lunashm-test-") + "/x.sock")
descriptors = [os.open("/dev/null", os.O_RDONLY)] * 200
host = Handover(endpoint, lambda ticket, pid: descriptors, counters)
host.open()
def turn():
    while not stop.wait(0.001):
        host.turn()
thread = threading.Thread(target=turn)
thread.start()
before = open_files()
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
rights = array.array("i", descriptors[:101])
ours.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])  # the limit counts for what comes next
say(attempt(b"ticket"))
ours.close()
theirs.close()  # what was under way is gone
say(open_files() - before)
say(counters)
stop.set()
thread.join()
host.close()
os.rmdir(os.path.dirname(endpoint.fds_path))
"""


def test_descriptors_that_too_many_are_under_way_for_are_refused_with_the_reason(runtime: Path) -> None:
    with child(runtime, PRELUDE + IN_FLIGHT, "ipc:///x.sock") as both:
        code, message = both.hear()
        assert code == "shared_memory"
        assert "on their way" in message
        assert both.hear() == 0
        assert both.hear() == {"error.shared_memory": 1}
        assert both.end() == 0


# -- others at the door ------------------------------------------------------------------------------------------------

SILENT = """
import socket
from lunashm.host.handover import MOST_OPEN
wires = []
for _ in range(3 * MOST_OPEN):
    wires.append(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
    wires[-1].connect(str(endpoint.fds_path))
say(len(wires))
sys.stdin.read()
"""


def test_silent_process_does_not_keep_another_waiting(memfd_host: HostProcess) -> None:
    with closing(Connection(memfd_host.endpoint)) as connection:
        ticket = granted(connection, model(memfd_host)).ticket
        with child(memfd_host.runtime, PRELUDE + SILENT, memfd_host.endpoint.url) as silent:
            silent.hear()
            descriptors = handover.redeem(memfd_host.endpoint, ticket, PATIENCE_S / 2)
            handover.close_all(descriptors)
        assert memfd_host.status().counters["dropped.handovers"] > 0


def waiting(endpoint: Endpoint) -> bool:
    """Whether somebody has connected whom the host has not accepted yet."""
    line = [line for line in Path("/proc/net/unix").read_text().splitlines() if line.endswith(str(endpoint.fds_path))]
    return len(line) > 1
