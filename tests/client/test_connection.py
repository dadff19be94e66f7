from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import zmq

from lunashm import protocol as p
from lunashm.client import connection as connection_module
from lunashm.client.connection import Connection
from lunashm.errors import (
    HostLost,
    HostTimeout,
    HostUnavailable,
    MalformedMessage,
    MessageTooLarge,
    ModelNotFound,
    ProtocolMismatch,
)
from lunashm.paths import Endpoint, HostLock
from lunashm.process import namespace
from tests.hosting import Hosting
from tests.messages import CLIENT, HOST
from tests.waiting import until


class Puppet:
    """A host that answers as the test says: it holds the lock and has the sockets, and does nothing by itself."""

    def __init__(self, pid: int | None = None, pid_namespace: int | None = None) -> None:
        self.endpoint = Endpoint.for_device("puppet")
        self.lock = HostLock(self.endpoint)
        self.lock.acquire()
        self.context = zmq.Context()
        self.router, self.events = self.context.socket(zmq.ROUTER), self.context.socket(zmq.PUB)
        for socket, url in ((self.router, self.endpoint.url), (self.events, self.endpoint.events)):
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVTIMEO, 10_000)
            socket.bind(url)
        self.info = p.HostInfo(
            "puppet", os.getpid() if pid is None else pid, namespace() if pid_namespace is None else pid_namespace,
            "cpu", "cpu", "heap", "", self.endpoint.url, "0", (), 0.0,
        )  # fmt: skip
        self.lock.publish(self.info)

    def receive(self) -> tuple[bytes, int, p.Request]:
        route, header, body = self.router.recv_multipart()
        return route, p.read_header(header), p.read_request(body)

    def answer(self, frames: Callable[[int], list[bytes]]) -> None:
        route, number, _ = self.receive()
        self.router.send_multipart([route, *frames(number)])

    def end(self) -> None:
        self.lock.release()
        self.context.destroy(0)


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    puppet = Puppet()
    yield puppet
    puppet.end()


@pytest.fixture
def wire(puppet: Puppet) -> Iterator[Connection]:
    connection = Connection(puppet.endpoint)
    yield connection
    connection.close()


# -- requests ----------------------------------------------------------------------------------------------------------


def test_reply_goes_to_the_request_it_belongs_to(puppet: Puppet, wire: Connection) -> None:
    futures = [wire.submit(p.Renew(str(number))) for number in range(3)]
    for route, number, request in reversed([puppet.receive() for _ in futures]):
        assert isinstance(request, p.Renew)
        puppet.router.send_multipart([route, *p.pack(p.ErrorReply("internal", request.client), number)])
    assert [future.result(10) for future in futures] == [p.ErrorReply("internal", str(n)) for n in range(3)]


def test_error_reply_is_raised_as_the_error_it_names(hosting: Hosting) -> None:
    with hosting.client() as client, pytest.raises(ModelNotFound, match="nothing"):
        client.request(p.ShowModel("nothing"))


def test_many_threads_share_one_connection(hosting: Hosting) -> None:
    answers: list[p.Reply] = []
    with hosting.client() as client:
        ask = lambda: [answers.append(client.request(p.GetStatus())) for _ in range(20)]  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(answers) == 160
    assert all(isinstance(answer, p.Status) for answer in answers)


def test_host_that_does_not_answer_is_a_time_out(wire: Connection) -> None:
    with pytest.raises(HostTimeout, match=r"GetStatus within 0\.05 s"):
        wire.request(p.GetStatus(), timeout_s=0.05)


def test_answer_that_comes_too_late_is_handed_to_whoever_cares(puppet: Puppet, wire: Connection) -> None:
    late: list[p.Reply] = []
    with pytest.raises(HostTimeout):
        wire.request(p.GetStatus(), timeout_s=0.0, on_late=late.append)
    puppet.answer(lambda number: p.pack(p.Done(), number))
    until(lambda: late == [p.Done()], "the late reply arrives")


def test_infinite_patience_is_possible(puppet: Puppet, wire: Connection) -> None:
    answering = threading.Thread(target=puppet.answer, args=(lambda number: p.pack(p.Done(), number),))
    answering.start()
    assert wire.request(p.Shutdown(), timeout_s=float("inf")) == p.Done()
    answering.join()


def test_what_the_host_would_refuse_unread_is_not_sent(wire: Connection) -> None:
    with pytest.raises(MalformedMessage):
        wire.submit(p.ShowModel("\ud800"))
    with pytest.raises(MessageTooLarge):
        wire.submit(p.ShowModel("a" * p.MAX_REQUEST_BYTES))
    assert wire.alive


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (lambda number: [p.pack(p.Done(), number)[0], b"\xc1"], MalformedMessage),
        (lambda number: [p.pack(p.Done(), number)[0]], MalformedMessage),
        (lambda number: p.pack(p.Shutdown(), number), MalformedMessage),  # a request is no reply
        (lambda number: [p.pack(p.Done(), number)[0].replace(b"LUNA\0", b"LUNA\x7f", 1), b""], ProtocolMismatch),
    ],
)
def test_reply_that_cannot_be_read_is_an_error_of_its_request(
    puppet: Puppet, wire: Connection, frames: Callable[[int], list[bytes]], error: type[Exception]
) -> None:
    future = wire.submit(p.GetStatus())
    puppet.answer(frames)
    reply = future.result(10)
    assert isinstance(reply, p.ErrorReply)
    assert reply.code == error.code  # type: ignore[attr-defined]


def test_reply_to_nothing_is_ignored(puppet: Puppet, wire: Connection) -> None:
    future = wire.submit(p.GetStatus())
    route, number, _ = puppet.receive()
    for wrong in (p.pack(p.Done(), number + 1), [b""], [b"", b"", b""]):
        puppet.router.send_multipart([route, *wrong])
    puppet.router.send_multipart([route, *p.pack(p.Done(), number)])
    assert future.result(10) == p.Done()


def test_cancelled_future_disturbs_nobody(puppet: Puppet, wire: Connection) -> None:
    wire.submit(p.GetStatus()).cancel()
    puppet.answer(lambda number: p.pack(p.Done(), number))
    future = wire.submit(p.GetStatus())
    puppet.answer(lambda number: p.pack(p.Done(), number))
    assert future.result(10) == p.Done()


def test_host_that_reads_nothing_does_not_block_the_caller(puppet: Puppet, wire: Connection) -> None:
    futures = [wire.submit(p.Renew("x")) for _ in range(5_000)]  # more than its queues hold
    puppet.lock.release()
    errors = {type(future.exception(10)) for future in futures}
    assert errors == {HostLost}


# -- the host's end ----------------------------------------------------------------------------------------------------


def test_no_host_is_unavailable(runtime: Path) -> None:
    with pytest.raises(HostUnavailable, match="lunashm serve"):
        Connection(Endpoint.for_device("cpu"))


def test_host_that_stops_in_order_ends_the_connection_after_its_last_words(hosting: Hosting) -> None:
    lost, events = threading.Event(), []
    connection = Connection(hosting.endpoint, on_event=events.append, on_lost=lost.set)
    until(lambda: connection.request(p.Register(CLIENT)) and events, "the subscription has reached the host")
    assert connection.request(p.Shutdown()) == p.Done()
    assert lost.wait(10)
    assert not connection.alive
    with pytest.raises(HostLost):
        connection.request(p.GetStatus())
    connection.close()


def test_host_of_another_pid_namespace_is_watched_by_its_lock(runtime: Path) -> None:
    puppet = Puppet(pid=1, pid_namespace=namespace() + 1)
    lost = threading.Event()
    connection = Connection(puppet.endpoint, on_lost=lost.set)
    waiting = connection.submit(p.GetStatus())
    puppet.receive()
    puppet.lock.release()
    assert isinstance(waiting.exception(10), HostLost)
    assert lost.wait(10)
    connection.close()
    puppet.end()


def test_every_waiting_request_fails_with_an_error_of_its_own(puppet: Puppet, wire: Connection) -> None:
    futures = [wire.submit(p.GetStatus()) for _ in range(3)]
    puppet.lock.release()
    errors = [future.exception(10) for future in futures]
    assert {type(error) for error in errors} == {HostLost}
    assert len({id(error) for error in errors}) == 3


def test_lock_of_a_dead_host_with_a_reused_pid_is_not_believed(
    puppet: Puppet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host ends between the look at its lock and the pidfd."""
    answers = iter([puppet.info, None])
    monkeypatch.setattr(connection_module, "find_host", lambda endpoint: next(answers))
    with pytest.raises(HostUnavailable, match="just stopped"):
        Connection(puppet.endpoint)


# -- events, idleness, closing -----------------------------------------------------------------------------------------


def test_events_are_passed_on_and_broken_ones_dropped(puppet: Puppet) -> None:
    events: list[p.Event] = []
    connection = Connection(puppet.endpoint, on_event=events.append)
    sent = p.ModelFreed("m", 1, 10)

    def tell() -> bool:
        for frames in ([b""], [b"", b""], p.pack(p.Done(), 1), p.pack(sent, 2)):
            puppet.events.send_multipart(frames)
        return sent in events

    until(tell, "the event arrives")
    assert set(map(type, events)) == {p.ModelFreed}
    connection.close()


def test_stopping_of_another_host_is_not_ours(puppet: Puppet) -> None:
    events: list[p.Event] = []
    connection = Connection(puppet.endpoint, on_event=events.append)
    sent = p.pack(p.HostStopping(HOST.host_id, "x"), 1)
    until(lambda: puppet.events.send_multipart(sent) or events, "the event arrives")
    assert connection.alive
    connection.close()


def test_idle_connection_calls_back_about_once_a_second(puppet: Puppet) -> None:
    calls: list[float] = []
    connection = Connection(puppet.endpoint, on_idle=lambda: calls.append(time.monotonic()))
    until(lambda: len(calls) == 2, "two calls")
    connection.close()
    assert calls[1] - calls[0] > 0.9


def test_closing_sends_what_is_left_to_say(puppet: Puppet) -> None:
    connection = Connection(puppet.endpoint)
    closing = threading.Thread(target=connection.close, args=(p.Unregister("c"),))
    closing.start()
    route, number, request = puppet.receive()
    assert request == p.Unregister("c")
    puppet.router.send_multipart([route, *p.pack(p.Done(), number)])
    closing.join(10)
    connection.close()
    assert not connection.alive
    with pytest.raises(HostLost, match="closed"):
        connection.request(p.GetStatus())


def test_connection_can_be_closed_from_its_own_callbacks(puppet: Puppet) -> None:
    closed = threading.Event()
    connection = Connection(puppet.endpoint)

    def close(future: Future[p.Reply]) -> None:
        connection.close(p.Unregister("c"))
        closed.set()

    connection.submit(p.GetStatus()).add_done_callback(close)
    puppet.answer(lambda number: p.pack(p.Done(), number))
    assert closed.wait(5)
    until(lambda: not connection.alive, "it ends")
    assert puppet.receive()[2] == p.Unregister("c")


def test_connections_give_back_all_descriptors_and_threads(hosting: Hosting) -> None:
    def open_and_close() -> None:
        connection = Connection(hosting.endpoint, on_event=lambda event: None)
        connection.request(p.GetStatus())
        connection.close()

    def used() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    open_and_close()
    before = used()
    for _ in range(3):
        open_and_close()
    gc.collect()
    until(lambda: used() <= before, "descriptors and threads come back")
