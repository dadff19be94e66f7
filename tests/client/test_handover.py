"""Fetching descriptors: from a host that does what it should, and from peers that do anything else."""

from __future__ import annotations

import array
import fcntl
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lunashm import errors
from lunashm import protocol as p
from lunashm.client import Session, handover
from lunashm.client import mappings as mappings_module
from lunashm.memory import rung_for
from lunashm.paths import Endpoint, HostLock
from tests.client.test_session import AS_STORED, leases
from tests.descriptors import generation_of_many, mapped, open_files
from tests.hosting import Hosting
from tests.messages import HOST
from tests.waiting import until

MANY = 200
Answer = Callable[[socket.socket], None]


@pytest.fixture
def hosting(tmp_path: Path) -> Iterator[Hosting]:
    hosting = Hosting(tmp_path, rung=rung_for("memfd", "cpu"))
    hosting.start()
    yield hosting
    hosting.stop()


@pytest.fixture
def redeemed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The tickets that were presented."""
    tickets: list[bytes] = []
    redeem = handover.redeem

    def noted(endpoint: Endpoint, ticket: bytes) -> list[int]:
        tickets.append(ticket)
        return redeem(endpoint, ticket)

    monkeypatch.setattr(handover, "redeem", noted)
    return tickets


# -- attaching ---------------------------------------------------------------------------------------------------------


def test_many_segments_are_attached_with_one_ticket(
    hosting: Hosting, session: Session, path: Path, redeemed: list[bytes]
) -> None:
    hosting.server.service._arena.add(generation_of_many(hosting.rung, path, MANY))
    before = open_files(), mapped()
    reply, mappings, _, _ = session.attach(str(path), AS_STORED, 60.0)
    assert [int.from_bytes(mapping.peek(0, 4), "little") for mapping in mappings] == list(range(MANY))
    assert redeemed == [reply.ticket]
    assert mapped() == before[1] + MANY
    del mappings
    until(lambda: (leases(hosting), mapped()) == (0, before[1]), "all is given back")
    assert hosting.counters()["request.Redeem"] == 1


def test_what_is_mapped_already_is_not_fetched_again(
    hosting: Hosting, session: Session, path: Path, redeemed: list[bytes]
) -> None:
    first = session.attach(str(path), AS_STORED, 60.0)
    second = session.attach(str(path), AS_STORED, 60.0)
    assert first[1][0] is second[1][0]
    assert redeemed == [first[0].ticket] != [second[0].ticket]


def test_hundred_attachments_leave_nothing(hosting: Hosting, session: Session, path: Path) -> None:
    session.attach(str(path), AS_STORED, 60.0)
    until(lambda: leases(hosting) == 0, "the first lease ends")
    before = open_files(), mapped()  # the host's are among them: it is a thread of this process
    for _ in range(100):
        reply, mappings, _, _ = session.attach(str(path), AS_STORED, 60.0)
        assert reply.ticket
        del mappings
    until(lambda: leases(hosting) == 0, "all leases end")
    until(lambda: (open_files(), mapped()) == before, "descriptors and mappings are what they were")
    assert len(hosting.server.service._tickets) == 0


@pytest.mark.parametrize("times", [1, 2])
def test_ticket_that_came_too_late_is_asked_for_anew_once(
    hosting: Hosting, session: Session, path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    redeem, late = handover.redeem, [True] * times

    def suspended(endpoint: Endpoint, ticket: bytes) -> list[int]:
        if late:
            late.pop()
            hosting.server.service._tickets.clear()
        return redeem(endpoint, ticket)

    monkeypatch.setattr(handover, "redeem", suspended)
    if times == 1:
        mappings = session.attach(str(path), AS_STORED, 60.0)[1]
        until(lambda: leases(hosting) == 1, "the first lease is given back")
        del mappings
    else:
        with pytest.raises(errors.TicketRefused, match="attach again"):
            session.attach(str(path), AS_STORED, 60.0)
    until(lambda: leases(hosting) == 0, "no lease is left")
    assert hosting.counters()["error.ticket_refused"] == times


def test_descriptors_are_closed_and_the_lease_given_back_if_mapping_fails(
    hosting: Hosting, session: Session, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle: some segments are mapped by then."""
    hosting.server.service._arena.add(generation_of_many(hosting.rung, path, 20))
    session.connect()
    opened, open_handle, before = [], mappings_module.open_handle, (open_files(), mapped())

    def refuse(handle: p.Handle, descriptor: int | None) -> object:
        opened.append(descriptor)
        if len(opened) > 10:
            raise errors.SharedMemoryError("no")
        return open_handle(handle, descriptor)

    monkeypatch.setattr(mappings_module, "open_handle", refuse)
    with pytest.raises(errors.SharedMemoryError) as kept:
        session.attach(str(path), AS_STORED, 60.0)
    until(lambda: leases(hosting) == 0, "the lease ends")
    until(lambda: (open_files(), mapped()) == before, "nothing is left open or mapped, though the error is kept")
    assert kept.value.message == "no"


def test_host_that_hands_over_too_few_descriptors_is_refused(
    hosting: Hosting, session: Session, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosting.server.service._arena.add(generation_of_many(hosting.rung, path, 2))
    redeem = hosting.server._handover._redeem
    monkeypatch.setattr(hosting.server._handover, "_redeem", lambda ticket, pid: redeem(ticket, pid)[:1])
    with pytest.raises(errors.MalformedMessage, match="1 descriptors for 2 segments"):
        session.attach(str(path), AS_STORED, 60.0)
    until(lambda: leases(hosting) == 0, "the lease ends")


# -- peers that are no host of ours ------------------------------------------------------------------------------------


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """Of a host that lives, as far as its lock says."""
    endpoint = Endpoint.for_device("fake")
    lock = HostLock(endpoint)
    lock.acquire()
    lock.publish(HOST)
    yield endpoint
    lock.release()


def answered(endpoint: Endpoint, answer: Answer, timeout_s: float = 10.0) -> list[int]:
    """What redeem() makes of a peer that hears one datagram, does ``answer`` and hangs up."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(endpoint.fds_path))
        listener.listen()

        def serve() -> None:
            peer, _ = listener.accept()
            with peer:
                peer.recv(1000)
                answer(peer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return handover.redeem(endpoint, b"ticket", timeout_s)
        finally:
            thread.join()


def sending(data: bytes, descriptors: int = 0) -> Answer:
    def send(peer: socket.socket) -> None:
        with open("/dev/null") as file:
            rights = array.array("i", [file.fileno()] * descriptors)
            peer.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if descriptors else [])

    return send


def both(*answers: Answer) -> Answer:
    return lambda peer: [answer(peer) for answer in answers] and None


def handed(first: int, total: int) -> bytes:
    return p.pack_datagram(p.HandedOver(first, total), 1)


BROKEN: dict[str, tuple[Answer, type[errors.LunashmError]]] = {
    "hangs up": (lambda peer: None, errors.TicketRefused),
    "hangs up in the middle": (sending(handed(0, 9), 5), errors.TicketRefused),
    "error": (sending(p.pack_datagram(p.ErrorReply("shared_memory", "no"), 1)), errors.SharedMemoryError),
    "error in the middle": (
        both(sending(handed(0, 9), 5), sending(p.pack_datagram(p.ErrorReply("shared_memory", "no"), 1))),
        errors.SharedMemoryError,
    ),
    "garbage": (sending(b"garbage", 5), errors.MalformedMessage),
    "garbage after a header": (sending(handed(0, 5)[:20], 5), errors.MalformedMessage),
    "another version": (sending(b"LUNA\0\x63" + handed(0, 5)[6:], 5), errors.ProtocolMismatch),
    "another message": (sending(b"".join(p.pack(p.Done(), 1)), 5), errors.MalformedMessage),
    "no descriptors": (sending(handed(0, 5)), errors.MalformedMessage),
    "none of none": (sending(handed(0, 0)), errors.MalformedMessage),
    "more than it says": (sending(handed(0, 4), 5), errors.MalformedMessage),
    "out of order": (sending(handed(1, 6), 5), errors.MalformedMessage),
    "the same twice": (both(sending(handed(0, 9), 5), sending(handed(0, 9), 5)), errors.MalformedMessage),
    "more than fits a datagram": (sending(handed(0, 200), 200), errors.SharedMemoryError),
}


@pytest.mark.parametrize("how", BROKEN)
def test_answer_that_is_wrong_is_an_error_and_leaves_no_descriptor(endpoint: Endpoint, how: str) -> None:
    answer, error = BROKEN[how]
    before = open_files()
    with pytest.raises(errors.LunashmError) as caught:
        answered(endpoint, answer)
    assert type(caught.value) is error
    assert open_files() == before


def test_right_answer_of_the_same_peer_is_taken(endpoint: Endpoint) -> None:
    before = open_files()
    descriptors = answered(endpoint, both(sending(handed(0, 9), 5), sending(handed(5, 9), 4)))
    assert open_files() == before + 9
    assert {fcntl.fcntl(fd, fcntl.F_GETFD) for fd in descriptors} == {fcntl.FD_CLOEXEC}
    handover.close_all(descriptors)


def test_refusal_by_a_host_that_hung_up_unheard_is_read_all_the_same(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not read when the host closes makes the kernel report a reset, before what the host said."""
    take, closed = handover._take, threading.Event()
    monkeypatch.setattr(handover, "_take", lambda *arguments: closed.wait(10) and take(*arguments))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(endpoint.fds_path))
        listener.listen()

        def refuse() -> None:
            peer, _ = listener.accept()
            select.select([peer], [], [], 10)
            sending(p.pack_datagram(p.ErrorReply("ticket_refused", "not you"), 0))(peer)
            peer.close()
            closed.set()

        thread = threading.Thread(target=refuse)
        thread.start()
        with pytest.raises(errors.TicketRefused, match="not you"):
            handover.redeem(endpoint, b"ticket")
        thread.join()


def test_host_that_does_not_answer_is_given_up_in_time(endpoint: Endpoint) -> None:
    before, gave_up = open_files(), threading.Event()

    def stall(peer: socket.socket) -> None:
        sending(handed(0, 9), 5)(peer)
        peer.recv(1)  # until the client hangs up
        gave_up.set()

    with pytest.raises(errors.HostTimeout, match="lunashm status"):
        answered(endpoint, stall, timeout_s=0.2)
    assert gave_up.is_set()
    assert open_files() == before


def test_host_that_accepts_nobody_is_given_up_in_time(endpoint: Endpoint) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(endpoint.fds_path))
        listener.listen(0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
            first.connect(str(endpoint.fds_path))  # its queue is full
            before = open_files()
            with pytest.raises(errors.HostTimeout):
                handover.redeem(endpoint, b"ticket", 0.2)
    assert open_files() == before - 2


@pytest.mark.parametrize("left", ["nothing", "a file", "a dead socket", "a socket of another kind"])
def test_host_that_cannot_be_reached_there_is_unavailable(endpoint: Endpoint, left: str) -> None:
    if left == "a file":
        endpoint.fds_path.touch()
    elif left != "nothing":
        kind = socket.SOCK_SEQPACKET if left == "a dead socket" else socket.SOCK_STREAM
        with socket.socket(socket.AF_UNIX, kind) as dead:
            dead.bind(str(endpoint.fds_path))
    before = open_files()
    with pytest.raises(errors.HostUnavailable, match="restart it"):
        handover.redeem(endpoint, b"ticket")
    assert open_files() == before


def test_host_that_is_gone_is_lost(runtime: Path) -> None:
    before = open_files()
    with pytest.raises(errors.HostLost, match="lunashm serve"):
        handover.redeem(Endpoint.for_device("cpu"), b"ticket")
    assert open_files() == before


def test_empty_ticket_is_not_presented(runtime: Path) -> None:
    with handover.borrowed(Endpoint.for_device("cpu"), b"", 3) as descriptors:
        assert descriptors == [None] * 3


@pytest.mark.parametrize("failing", [False, True])
def test_borrowed_descriptors_are_closed_whatever_happens(
    runtime: Path, monkeypatch: pytest.MonkeyPatch, failing: bool
) -> None:
    fd = os.open("/dev/null", os.O_RDONLY)
    monkeypatch.setattr(handover, "redeem", lambda endpoint, ticket: [fd])
    try:
        with handover.borrowed(Endpoint.for_device("cpu"), b"ticket", 1) as descriptors:
            descriptors.clear()
            if failing:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
