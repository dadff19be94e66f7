from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lunashm import protocol as p
from lunashm.client import Session, session_for
from lunashm.errors import HostLost, HostTimeout, HostUnavailable, ModelNotFound, NotRegistered, SegmentGone
from lunashm.manifest import DtypeRule
from lunashm.memory import Rung
from lunashm.paths import Endpoint
from tests import checkpoints
from tests.hosting import Hosting
from tests.waiting import until

AS_STORED = (DtypeRule("", ""),)


def status(hosting: Hosting) -> p.Status:
    with hosting.client() as client:
        reply = client.request(p.GetStatus())
        assert isinstance(reply, p.Status)
        return reply


def leases(hosting: Hosting) -> int:
    return status(hosting).leases


# -- registering -------------------------------------------------------------------------------------------------------


def test_process_registers_once_on_first_use(hosting: Hosting, session: Session) -> None:
    assert (session.host, session.client_id, session.epoch) == (None, "", 0)
    assert session.connect() == hosting.server.service.info == session.host
    session.request(p.GetStatus())
    assert session.epoch == 1
    reply = session.request(p.ListClients())
    assert isinstance(reply, p.Clients)
    assert [(c.client, c.info.kind, c.info.label, c.watched) for c in reply.clients] == [
        (session.client_id, "test", "unit", "process")
    ]


def test_threads_that_connect_at_once_register_once(hosting: Hosting, session: Session) -> None:
    with ThreadPoolExecutor(8) as pool:
        hosts = list(pool.map(lambda _: session.connect().host_id, range(16)))
    assert len(set(hosts)) == 1
    assert session.epoch == 1
    assert hosting.counters()["request.Register"] == 1


def test_one_process_has_one_session_per_endpoint(hosting: Hosting) -> None:
    assert session_for(hosting.endpoint, kind="a") is session_for(hosting.endpoint, kind="b")
    assert session_for(Endpoint.for_device("other")) is not session_for(hosting.endpoint)


def test_no_host_is_unavailable_and_later_found(runtime: Path, tmp_path: Path) -> None:
    session = Session(Endpoint.for_device("cpu"), kind="test", label="")
    with pytest.raises(HostUnavailable):
        session.connect()
    assert not session.host_is_back()
    hosting = Hosting(tmp_path)
    hosting.start()
    assert session.host_is_back()
    session.connect()
    assert not session.host_is_back()
    session.close()
    hosting.stop()


def test_closed_session_has_left_the_host_and_can_come_back(hosting: Hosting, session: Session) -> None:
    session.connect()
    session.close()
    session.close()
    assert session.host is None
    assert hosting.counters()["client.left"] == 1
    session.connect()
    assert session.epoch == 2


def test_session_finds_the_next_host_after_one_stopped(tmp_path: Path) -> None:
    first, second = Hosting(tmp_path), Hosting(tmp_path)
    first.start()
    session = Session(first.endpoint, kind="test", label="")
    heard: list[p.Event] = []
    session.listen(heard.append)
    until(lambda: session.request(p.Register(CLIENT_INFO)) and heard, "the subscription has reached the host")
    first.stop()
    until(lambda: session.host is None, "the session notices")
    with pytest.raises(HostUnavailable):
        session.connect()
    second.start()
    assert session.host_is_back()
    assert session.connect().host_id == second.server.service.info.host_id
    assert session.epoch == 2
    session.close()
    second.stop()


CLIENT_INFO = p.ClientInfo(1, 0, 0, "nobody", "", "0")


# -- staying alive -----------------------------------------------------------------------------------------------------


def test_session_renews_in_time(tmp_path: Path) -> None:
    hosting = Hosting(tmp_path, ttl_s=3.0)
    hosting.start()
    session = Session(hosting.endpoint, kind="test", label="")
    session.connect()
    until(lambda: hosting.counters().get("request.Renew", 0) >= 1, "a renewal", 5)
    session.close()
    hosting.stop()


def drop(hosting: Hosting, session: Session) -> None:
    """As the host does with a client that was silent for too long."""
    session.request(p.Unregister(session.client_id))


def test_client_that_was_dropped_registers_anew_over_the_same_wire(
    hosting: Hosting, session: Session, path: Path
) -> None:
    session.attach(str(path), AS_STORED, 60.0)
    wire = session._current.connection
    drop(hosting, session)
    epoch = session.attach(str(path), AS_STORED, 60.0).epoch
    assert epoch == session.epoch == 2
    assert session._current.connection is wire
    assert status(hosting).clients == 1


def test_renewal_that_is_refused_ends_the_registration(hosting: Hosting, session: Session) -> None:
    session.connect()
    drop(hosting, session)
    session._current.next_renewal = 0.0
    until(lambda: session.host is None, "the session notices", 5)
    assert session.host_is_back()


def test_client_that_is_refused_twice_gives_up(
    hosting: Hosting, session: Session, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise NotRegistered("never heard of you")

    monkeypatch.setattr(hosting.server.service._leases, "renew", refuse)
    with pytest.raises(NotRegistered):
        session.attach(str(path), AS_STORED, 60.0)
    assert session.epoch == 2


# -- leases follow memory ----------------------------------------------------------------------------------------------


def test_lease_lives_exactly_as_long_as_its_mapping(hosting: Hosting, session: Session, path: Path) -> None:
    _, buffers, _, _ = session.attach(str(path), AS_STORED, 60.0)
    view = memoryview(buffers[0])
    del buffers
    gc.collect()
    assert leases(hosting) == 1
    view.release()
    del view
    gc.collect()
    until(lambda: leases(hosting) == 0, "the lease ends")


def test_segment_is_mapped_once_in_a_process(hosting: Hosting, session: Session, path: Path) -> None:
    first = session.attach(str(path), AS_STORED, 60.0)[1]
    second = session.attach(str(path), AS_STORED, 60.0)[1]
    assert first[0] is second[0]
    assert leases(hosting) == 2
    del first, second
    gc.collect()
    until(lambda: leases(hosting) == 0, "both leases end")


def test_view_that_dies_in_a_cycle_in_any_thread_releases_its_lease(
    hosting: Hosting, session: Session, path: Path
) -> None:
    """The collector may run in the middle of anything, in the connection's own thread, too."""
    for _ in range(5):
        cycle: dict[str, object] = {"buffers": session.attach(str(path), AS_STORED, 60.0)[1]}
        cycle["self"] = cycle
        del cycle
        session._current.connection.submit(p.GetStatus()).add_done_callback(lambda future: gc.collect())
    until(lambda: leases(hosting) == 0, "the leases end")


def test_view_that_dies_while_another_thread_connects_does_not_wait(
    hosting: Hosting, session: Session, path: Path
) -> None:
    buffers = session.attach(str(path), AS_STORED, 60.0)[1]
    with session._connecting:  # somebody waits for a host that does not answer
        done = threading.Event()

        def let_go(held: list[object]) -> None:
            held.clear()
            assert session.host is not None
            done.set()

        holder: list[object] = [buffers]
        del buffers
        threading.Thread(target=let_go, args=(holder,)).start()
        assert done.wait(5)
    until(lambda: leases(hosting) == 0, "the lease ends")


def test_lease_that_is_granted_too_late_is_given_back(
    hosting: Hosting, session: Session, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, allocate = threading.Event(), hosting.rung.allocate
    monkeypatch.setattr(hosting.rung, "allocate", lambda nbytes: (gate.wait(10), allocate(nbytes))[1])
    monkeypatch.setattr("lunashm.client.session.REPLY_S", -59.9)
    session.connect()
    with pytest.raises(HostTimeout):
        session.attach(str(path), AS_STORED, 60.0)
    gate.set()
    until(lambda: hosting.counters().get("request.Detach"), "the lease comes back")
    assert leases(hosting) == 0


def test_lease_whose_memory_cannot_be_mapped_is_given_back(
    hosting: Hosting, session: Session, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(rung: Rung, handle: p.Handle, descriptor: int | None) -> None:
        raise SegmentGone("no")

    with monkeypatch.context() as patch:
        patch.setattr(type(hosting.rung), "open", refuse)
        with pytest.raises(SegmentGone):
            session.attach(str(path), AS_STORED, 60.0)
    until(lambda: leases(hosting) == 0, "the lease ends")
    session.attach(str(path), AS_STORED, 60.0)


def test_lease_is_given_back_over_a_new_wire_if_the_old_one_broke(
    hosting: Hosting, session: Session, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffers = session.attach(str(path), AS_STORED, 60.0)[1]
    wire = session._current.connection
    wire._dealer.close()  # the thread fails on its next use
    with pytest.raises(HostLost):
        wire.request(p.GetStatus())
    assert session.host is None
    session.connect()
    assert session._current.connection is not wire
    assert leases(hosting) == 1
    del buffers
    gc.collect()
    until(lambda: leases(hosting) == 0, "the lease ends")


def test_refused_attach_leaves_nothing(hosting: Hosting, session: Session) -> None:
    with pytest.raises(ModelNotFound):
        session.attach(str(hosting.root / "missing.sft"), AS_STORED, 60.0)
    assert leases(hosting) == 0


@pytest.mark.parametrize("count", [10, 1000])
def test_attach_takes_one_request_and_one_reply_however_many_tensors(
    hosting: Hosting, session: Session, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hosting.root / "many.safetensors"
    checkpoints.write(path, {f"tensor{n}": ("F16", (2,)) for n in range(count)})
    session.request(p.Load(str(path), AS_STORED, 60.0))
    before = {name: value for name, value in hosting.counters().items() if name.startswith("request.")}
    replies: list[p.Reply] = []
    read = p.read_reply
    monkeypatch.setattr(p, "read_reply", lambda body: replies.append(read(body)) or replies[-1])
    reply, buffers, _, _ = session.attach(str(path), AS_STORED, 60.0)
    assert len(reply.manifest.tensors) == count
    assert len(buffers) == 1
    assert [type(r) for r in replies] == [p.Attached]
    monkeypatch.undo()
    after = {name: value for name, value in hosting.counters().items() if name.startswith("request.")}
    new = {name: value - before.get(name, 0) for name, value in after.items() if value != before.get(name)}
    fetched = {"request.Redeem": 1} if hosting.rung.name == "memfd" else {}
    assert new == {"request.Attach": 1, "request.GetStatus": 1, **fetched}


# -- events ------------------------------------------------------------------------------------------------------------


def test_listener_hears_events_until_it_is_stopped(hosting: Hosting, session: Session, path: Path) -> None:
    heard: list[p.Event] = []
    broken: list[p.Event] = []

    def break_down(event: p.Event) -> None:
        broken.append(event)
        raise ZeroDivisionError("listener")

    session.listen(break_down)
    stop = session.listen(heard.append)
    until(lambda: session.request(p.Register(CLIENT_INFO)) and heard, "an event arrives")
    assert len(broken) >= len(heard)  # one that fails does not disturb the others
    stop()
    stop()
    count = len(heard)
    until(lambda: session.request(p.Register(CLIENT_INFO)) and len(broken) > count + 2, "more events arrive")
    assert len(heard) <= count + 1
