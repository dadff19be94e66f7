"""The socket where descriptors are handed over, on a real host in a thread. Other processes are in tests/faults."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lunashm import protocol as p
from lunashm.client import handover as client
from lunashm.client.connection import Connection
from lunashm.errors import SettingsError, TicketRefused
from lunashm.host import handover as host
from lunashm.memory import rung_for
from lunashm.memory.memfd import MemfdRung
from lunashm.paths import Endpoint
from tests import checkpoints
from tests.descriptors import connected, fetched, granted, heard, open_files, refusal
from tests.hosting import Hosting
from tests.waiting import until

NUMBER = 7


@pytest.fixture
def hosting(tmp_path: Path) -> Iterator[Hosting]:
    hosting = Hosting(tmp_path, rung=rung_for("memfd", "cpu"))
    hosting.start()
    yield hosting
    assert hosting.counters().get("error.internal", 0) == 0
    hosting.stop()


@pytest.fixture
def connection(hosting: Hosting) -> Iterator[Connection]:
    with hosting.client() as connection:
        yield connection


@pytest.fixture
def path(hosting: Hosting) -> Path:
    checkpoints.write(hosting.root / "m.safetensors")
    return hosting.root / "m.safetensors"


def redeem(ticket: bytes) -> bytes:
    return p.pack_datagram(p.Redeem(ticket), NUMBER)


# -- the socket itself -------------------------------------------------------------------------------------------------


def test_socket_of_a_killed_host_is_taken_over(tmp_path: Path, runtime: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(str(runtime / "cpu.fds.sock"))
    hosting = Hosting(tmp_path)
    hosting.start()
    assert refusal(hosting.endpoint, redeem(b"")) == ("ticket_refused", NUMBER)
    hosting.stop()


def test_socket_that_cannot_be_bound_is_a_settings_error_that_leaves_nothing_open(
    tmp_path: Path, runtime: Path
) -> None:
    (runtime / "cpu.fds.sock").mkdir()
    before = open_files()
    with pytest.raises(SettingsError, match="cannot listen"):
        Hosting(tmp_path).server.run(lambda info: None)
    until(lambda: open_files() <= before, "all descriptors are given back")


# -- tickets -----------------------------------------------------------------------------------------------------------


def test_ticket_brings_the_descriptors_of_its_lease(hosting: Hosting, connection: Connection, path: Path) -> None:
    attached = granted(connection, path)
    before = open_files()
    (descriptor,) = client.redeem(hosting.endpoint, attached.ticket)
    assert fcntl.fcntl(descriptor, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    mapping = MemfdRung().open(attached.handles[0], descriptor)
    os.close(descriptor)
    spec = attached.manifest.tensors[0]
    stored = checkpoints.write(path)[spec.name]
    assert bytes(mapping.peek(spec.offset, spec.nbytes)) == stored
    del mapping
    until(lambda: open_files() == before, "nothing is left open on either side")


def test_handles_that_are_enough_come_without_a_ticket(tmp_path: Path) -> None:
    hosting = Hosting(tmp_path, rung=rung_for("posix", "cpu"))
    hosting.start()
    checkpoints.write(tmp_path / "m.safetensors")
    with hosting.client() as connection:
        assert granted(connection, tmp_path / "m.safetensors").ticket == b""
    assert len(hosting.server.service._tickets) == 0
    hosting.stop()


def test_used_ticket_is_refused_and_counted(hosting: Hosting, connection: Connection, path: Path) -> None:
    ticket = granted(connection, path).ticket
    assert fetched(hosting.endpoint, ticket) == 1
    assert refusal(hosting.endpoint, redeem(ticket)) == ("ticket_refused", NUMBER)
    assert hosting.counters()["error.ticket_refused"] == 1
    assert hosting.counters()["request.Redeem"] == 2


def test_forged_ticket_is_refused_with_what_to_do(hosting: Hosting, connection: Connection, path: Path) -> None:
    ticket = granted(connection, path).ticket
    forged = bytes([ticket[0] ^ 1]) + ticket[1:]
    with pytest.raises(TicketRefused, match="attach again"):
        client.redeem(hosting.endpoint, forged)
    assert fetched(hosting.endpoint, ticket) == 1


def test_each_lease_has_a_ticket_of_its_own(hosting: Hosting, connection: Connection, path: Path) -> None:
    first, second = granted(connection, path), granted(connection, path)
    assert first.ticket != second.ticket
    assert [fetched(hosting.endpoint, reply.ticket) for reply in (second, first)] == [1, 1]


def test_refusals_are_logged_once_each(
    hosting: Hosting, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        assert refusal(hosting.endpoint, redeem(b"forged")) == ("ticket_refused", NUMBER)
    assert [f"pid {os.getpid()}" in r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [True, True]


# -- what is no Redeem -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("datagrams", "code", "number"),
    [
        ([b"\0"], "malformed_message", 0),
        ([b"GET / HTTP/1.1\r\n\r\n"], "malformed_message", int.from_bytes(b"HTTP/1.1")),
        ([redeem(b"x" * 32)[:5]], "malformed_message", 0),
        ([redeem(b"x" * 32)[:14]], "malformed_message", NUMBER),
        ([redeem(b"x" * 32)[:14], redeem(b"x" * 32)[14:]], "malformed_message", NUMBER),
        ([redeem(b"x" * 32)[:-1]], "malformed_message", NUMBER),
        ([redeem(b"x" * 32) + b"\0"], "malformed_message", NUMBER),
        ([b"LUNA\0\x01" + redeem(b"x" * 32)[6:]], "protocol_mismatch", NUMBER),
        ([b"".join(p.pack(p.Shutdown(), NUMBER))], "malformed_message", NUMBER),
        ([redeem(b"x" * 32) + bytes(p.MAX_DATAGRAM_BYTES)], "message_too_large", NUMBER),
        ([redeem(b"x" * 4000), redeem(b"x" * 4000)], "ticket_refused", NUMBER),
    ],
)
def test_what_is_no_redeem_gets_a_typed_error_and_is_hung_up_on(
    hosting: Hosting, datagrams: list[bytes], code: str, number: int
) -> None:
    assert refusal(hosting.endpoint, *datagrams) == (code, number)
    assert hosting.counters()[f"error.{code}"] == 1


def test_peers_that_leave_without_a_word_cost_nothing(hosting: Hosting) -> None:
    before = open_files()
    for _ in range(20):
        with connected(hosting.endpoint):
            pass
        with connected(hosting.endpoint) as wire, contextlib.suppress(BrokenPipeError):
            wire.send(b"")
    until(lambda: hosting.server.service.counters["dropped.handovers"] == 40, "all are dropped")
    assert open_files() == before


def test_descriptors_that_a_peer_sends_are_not_taken(hosting: Hosting) -> None:
    before = open_files()
    with connected(hosting.endpoint) as wire, open("/dev/null") as file:
        rights = array.array("i", [file.fileno()] * 200)
        wire.sendmsg([redeem(b"forged")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
        assert heard(wire)
        assert heard(wire) == b""
        assert open_files() == before + 2  # our own socket, our own file
    assert open_files() == before


# -- peers that hold us up ---------------------------------------------------------------------------------------------


def test_silent_peer_is_dropped_in_time_although_nothing_else_happens(
    hosting: Hosting, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "PATIENCE_S", 0.2)
    with connected(hosting.endpoint) as wire:
        wire.settimeout(hosting.server._idle_ms / 2000)  # no tick of the idle loop is what drops it
        assert heard(wire) == b""
    assert hosting.counters()["dropped.handovers"] == 1


def test_flood_of_silent_peers_keeps_nobody_out_and_stays_bounded(
    hosting: Hosting, connection: Connection, path: Path
) -> None:
    ticket = granted(connection, path).ticket
    before = open_files()
    with contextlib.ExitStack() as stack:
        for _ in range(3 * host.MOST_OPEN):
            stack.enter_context(connected(hosting.endpoint))
        assert fetched(hosting.endpoint, ticket) == 1
        assert open_files() <= before + 3 * host.MOST_OPEN + host.MOST_OPEN  # ours, and the host's
        assert hosting.counters()["dropped.handovers"] >= 2 * host.MOST_OPEN
    until(lambda: open_files() == before, "all places are free again")


def test_peer_that_does_not_read_is_dropped_and_holds_nobody_up(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One descriptor a datagram: more datagrams than a socket holds, with few enough descriptors under way."""
    monkeypatch.setattr(p, "DESCRIPTORS_PER_DATAGRAM", 1)
    before = open_files()
    with handing_out([1] * 900) as (endpoint, counters), connected(endpoint) as wire:
        wire.send(redeem(b""))
        until(lambda: counters["dropped.handovers"], "it is dropped")
        first = heard(wire)
        assert p.read_handed(p.split_datagram(first)[1]) == p.HandedOver(0, 900)
    assert open_files() == before


def test_client_of_a_host_that_dropped_it_is_told_to_attach_again(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p, "DESCRIPTORS_PER_DATAGRAM", 1)
    before = open_files()
    with handing_out([1] * 900) as (endpoint, counters):
        monkeypatch.setattr(client, "_take", late(counters))
        monkeypatch.setattr(client, "find_host", lambda endpoint: "there")
        with pytest.raises(TicketRefused, match=r"hung up .* attach again"):
            client.redeem(endpoint, b"")
    assert open_files() == before


def late(counters: Counter[str]) -> object:
    """A client that begins to read when the host has given it up."""
    take = client._take

    def taken(wire: socket.socket, endpoint: Endpoint, descriptors: list[int]) -> int:
        until(lambda: counters["dropped.handovers"], "it is dropped")
        return take(wire, endpoint, descriptors)

    return taken


@contextlib.contextmanager
def handing_out(descriptors: list[int]) -> Iterator[tuple[Endpoint, Counter[str]]]:
    """The socket alone, turning in a thread, with the same descriptors for every ticket."""
    endpoint, counters, done = Endpoint.for_device("cpu"), Counter[str](), threading.Event()
    handover = host.Handover(endpoint, lambda ticket, pid: descriptors, counters)
    handover.open()

    def turn() -> None:
        while not done.wait(0.001):
            handover.turn()

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        yield endpoint, counters
    finally:
        done.set()
        thread.join()
        handover.close()


@pytest.mark.parametrize("count", [1, 127, 128, 129, 200, 256, 300])
def test_descriptors_come_in_batches_and_in_order(runtime: Path, count: int) -> None:
    with contextlib.ExitStack() as stack:
        files = [os.memfd_create(f"number{number}") for number in range(count)]
        stack.callback(client.close_all, files)
        endpoint, _ = stack.enter_context(handing_out(list(files)))
        received = client.redeem(endpoint, b"")
        stack.callback(client.close_all, received)
        assert [os.fstat(fd).st_ino for fd in received] == [os.fstat(fd).st_ino for fd in files]
