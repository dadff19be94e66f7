"""The loop and its sockets, in a thread of the test. Whole host processes are killed in tests/faults."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from lunashm import protocol as p
from lunashm.client.connection import Connection
from lunashm.errors import AlreadyServing, HostUnavailable, LunashmError, SettingsError
from lunashm.manifest import DtypeRule
from lunashm.paths import Endpoint, HostLock, find_host
from lunashm.process import namespace, start_ticks
from tests import checkpoints
from tests.hosting import Hosting
from tests.waiting import until

SIGNALS = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
"""As they are before any host ran: a shell starts what runs in the background with SIGINT ignored."""


@pytest.fixture
def hosting(tmp_path: Path) -> Iterator[Hosting]:
    hosting = Hosting(tmp_path)
    hosting.start()
    yield hosting
    hosting.stop()


@pytest.fixture
def wire(hosting: Hosting) -> Iterator[zmq.Socket[bytes]]:
    """A socket that sends whatever the test likes."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.RCVTIMEO, 10_000)
        dealer.connect(hosting.endpoint.url)
        yield dealer


def me(pid: int | None = None) -> p.ClientInfo:
    pid = os.getpid() if pid is None else pid
    return p.ClientInfo(pid, namespace(), start_ticks(pid), "test", "", "0")


def register(connection: Connection, pid: int | None = None) -> str:
    reply = connection.request(p.Register(me(pid)))
    assert isinstance(reply, p.Registered)
    return reply.client


# -- starting and stopping ---------------------------------------------------------------------------------------------


def test_host_is_found_while_it_runs_and_leaves_no_socket(tmp_path: Path, runtime: Path) -> None:
    hosting = Hosting(tmp_path)
    hosting.start()
    assert find_host(hosting.endpoint) == hosting.server.service.info
    hosting.stop()
    assert find_host(hosting.endpoint) is None
    assert [path.name for path in runtime.iterdir()] == ["cpu.lock"]


def test_sockets_are_for_their_user_alone(hosting: Hosting, runtime: Path) -> None:
    for name in ("cpu.sock", "cpu.events.sock", "cpu.fds.sock", "cpu.lock"):
        assert stat.S_IMODE((runtime / name).stat().st_mode) == 0o600


def test_second_host_of_an_endpoint_is_refused_and_the_first_goes_on(hosting: Hosting, tmp_path: Path) -> None:
    with pytest.raises(AlreadyServing, match=str(os.getpid())):
        Hosting(tmp_path).server.run(lambda info: None)
    hosting.counters()


def test_sockets_of_a_killed_host_are_taken_over(tmp_path: Path, runtime: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(runtime / "cpu.sock"))
    hosting = Hosting(tmp_path)
    hosting.start()
    hosting.counters()
    hosting.stop()


def test_endpoint_that_cannot_be_bound_is_a_settings_error_and_frees_the_lock(tmp_path: Path, runtime: Path) -> None:
    (runtime / "cpu.events.sock").mkdir()
    hosting = Hosting(tmp_path)
    with pytest.raises(SettingsError, match="cannot listen"):
        hosting.server.run(lambda info: None)
    lock = HostLock(hosting.endpoint)
    lock.acquire(patience_s=0)
    lock.release()


def test_server_gives_back_all_descriptors_and_threads(tmp_path: Path) -> None:
    Hosting(tmp_path)  # whatever is imported and opened once
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    hosting = Hosting(tmp_path)
    hosting.start()
    checkpoints.write(tmp_path / "m.safetensors")
    with hosting.client() as client:
        register(client)
        client.request(p.Load(str(tmp_path / "m.safetensors"), (), 60.0))
    hosting.stop()
    until(lambda: (len(os.listdir("/proc/self/fd")), threading.active_count()) == before, "descriptors and threads")


def test_signals_stay_as_they_were_off_the_main_thread(hosting: Hosting) -> None:
    assert {number: signal.getsignal(number) for number in SIGNALS} == SIGNALS


def test_shutdown_is_answered_and_ends_the_host(hosting: Hosting) -> None:
    with hosting.client() as client:
        assert client.request(p.Shutdown()) == p.Done()
    until(lambda: not hosting.running, "the host ends")


def test_failing_ready_callback_ends_the_host_in_order(tmp_path: Path) -> None:
    server = Hosting(tmp_path).server
    with pytest.raises(BrokenPipeError):
        server.run(lambda info: (_ for _ in ()).throw(BrokenPipeError()))
    assert find_host(Endpoint.for_device("cpu")) is None


# -- requests ----------------------------------------------------------------------------------------------------------


def test_load_runs_beside_the_loop_and_its_reply_comes_when_it_is_done(hosting: Hosting) -> None:
    path = hosting.root / "m.safetensors"
    checkpoints.write(path)
    with hosting.client() as client:
        reply = client.request(p.Load(str(path), (), 60.0))
    assert isinstance(reply, p.Loaded)
    assert reply.model.tensors == len(checkpoints.SMALL)


def test_surprise_in_a_request_is_answered_and_the_host_goes_on(
    hosting: Hosting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def surprise(*arguments: object) -> None:
        raise ZeroDivisionError("surprise")

    with hosting.client() as client:
        monkeypatch.setattr(hosting.server.service._reports, "clients", surprise)
        with pytest.raises(LunashmError, match="surprise"):
            client.request(p.ListClients())
        monkeypatch.undo()
        assert isinstance(client.request(p.ListClients()), p.Clients)
    assert hosting.counters()["error.internal"] == 1


@pytest.mark.parametrize("step", ["tick", "drop_client", "finish"])
def test_surprise_between_requests_is_survived(
    hosting: Hosting, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    happened = threading.Event()

    def surprise(*arguments: object) -> None:
        happened.set()
        raise ZeroDivisionError("surprise")

    checkpoints.write(hosting.root / "m.safetensors")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with hosting.client() as client:
        register(client, child.pid)
        with monkeypatch.context() as patch:
            patch.setattr(hosting.server.service, step, surprise)
            client.submit(p.Load(str(hosting.root / "m.safetensors"), (), 0.0))
            child.communicate(b"\n")
            assert happened.wait(10)
            until(lambda: hosting.server.service.counters["error.internal"], "the surprise is counted")
        assert isinstance(client.request(p.GetStatus()), p.Status)


def test_reply_too_large_to_send_becomes_an_error_and_its_lease_ends(
    hosting: Hosting, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hosting.root / "m.safetensors"
    checkpoints.write(path, {f"tensor{n}": ("U8", (1,)) for n in range(200)})
    pack = p.pack
    with hosting.client() as client:
        name = register(client)
        monkeypatch.setattr(p, "pack", lambda message, number, limit=4096: pack(message, number, min(limit, 4096)))
        with pytest.raises(LunashmError) as caught:
            client.request(p.Attach(name, str(path), (DtypeRule("", ""),), 60.0))
        monkeypatch.undo()
        assert caught.value.code == "message_too_large"
        status = client.request(p.GetStatus())
        assert isinstance(status, p.Status)
        assert status.leases == 0


def test_reply_to_somebody_who_left_is_dropped_and_its_lease_ends(hosting: Hosting) -> None:
    gate = threading.Event()
    path = hosting.root / "m.safetensors"
    checkpoints.write(path)
    allocate = hosting.rung.allocate
    hosting.rung.allocate = lambda nbytes: (gate.wait(10), allocate(nbytes))[1]  # type: ignore[method-assign]
    with hosting.client() as client:
        name = register(client)
        client.submit(p.Attach(name, str(path), (), 60.0))
        client.request(p.Renew(name))  # so the one before has arrived
    gate.set()
    until(lambda: hosting.counters().get("dropped.replies"), "the reply is dropped")
    with hosting.client() as client:
        status = client.request(p.GetStatus())
        assert isinstance(status, p.Status)
        assert (status.leases, status.clients) == (0, 1)


# -- what is no request ------------------------------------------------------------------------------------------------


def test_wrong_number_of_frames_is_dropped_and_counted(hosting: Hosting, wire: zmq.Socket[bytes]) -> None:
    frames = p.pack(p.GetStatus(), 1)
    for wrong in ([b""], [frames[1]], [*frames, b"more"], [b"", *frames]):
        wire.send_multipart(wrong)
    wire.send_multipart(frames)
    reply = p.read_reply(wire.recv_multipart()[1])
    assert isinstance(reply, p.Status)
    assert reply.counters["dropped.frames"] == 4


@pytest.mark.parametrize(
    ("frames", "code", "number"),
    [
        ([b"", b""], "malformed_message", 0),
        ([b"HTTP" + bytes(9) + b"\x05", b""], "malformed_message", 5),
        ([b"LUNA\x00\x01" + bytes(7) + b"\x05", b""], "protocol_mismatch", 5),
        ([p.pack(p.Done(), 7)[0], b"\xc1"], "malformed_message", 7),
        (p.pack(p.Done(), 7), "malformed_message", 7),
        ([p.pack(p.Done(), 7)[0], msgspec.msgpack.encode({"type": "Format", "disk": "c:"})], "malformed_message", 7),
        ([p.pack(p.Done(), 7)[0], bytes(p.MAX_REQUEST_BYTES + 1)], "message_too_large", 7),
    ],
)
def test_message_that_cannot_be_read_gets_a_typed_error(
    hosting: Hosting, wire: zmq.Socket[bytes], frames: list[bytes], code: str, number: int
) -> None:
    wire.send_multipart(frames)
    header, body = wire.recv_multipart()
    reply = p.read_reply(body)
    assert isinstance(reply, p.ErrorReply)
    assert (reply.code, p.read_header(header)) == (code, number)
    assert hosting.counters()[f"error.{code}"] == 1


def test_frame_over_the_limit_disconnects_its_sender_alone(hosting: Hosting) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        watch = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        dealer.connect(hosting.endpoint.url)
        dealer.send_multipart([p.pack(p.Done(), 1)[0], bytes(p.MAX_FRAME_BYTES + 1)])
        assert watch.poll(10_000)
        dealer.disable_monitor()
        watch.close()
    hosting.counters()


def test_bytes_that_are_not_even_zeromq_are_survived(hosting: Hosting) -> None:
    for garbage in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1000), os.urandom(1000)):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(str(hosting.endpoint.socket_path))
            with contextlib.suppress(OSError):
                raw.sendall(garbage)
    hosting.counters()


def test_flood_does_not_hide_a_stop(tmp_path: Path) -> None:
    hosting = Hosting(tmp_path)
    hosting.start()
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.setsockopt(zmq.LINGER, 0)
        dealer.setsockopt(zmq.SNDHWM, 0)
        dealer.connect(hosting.endpoint.url)
        for number in range(20_000):
            dealer.send_multipart(p.pack(p.Renew("nobody"), number))
        hosting.stop()


# -- clients -----------------------------------------------------------------------------------------------------------


def test_client_whose_process_ends_is_dropped(hosting: Hosting) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with hosting.client() as client:
        register(client, child.pid)
        child.kill()
        child.communicate()
        until(lambda: client.request(p.ListClients()) == p.Clients(()), "the client is dropped")
    assert hosting.counters()["client.process_ended"] == 1


def test_client_that_cannot_be_seen_is_dropped_when_it_is_silent(tmp_path: Path) -> None:
    hosting = Hosting(tmp_path, ttl_s=0.2)
    hosting.start()
    with hosting.client() as client:
        client.request(p.Register(msgspec.structs.replace(me(), pid_namespace=1)))
        reply = client.request(p.ListClients())
        assert isinstance(reply, p.Clients)
        assert [person.watched for person in reply.clients] == ["renewal"]
        until(lambda: client.request(p.ListClients()) == p.Clients(()), "the client is dropped")
    hosting.stop()


def test_host_has_gone_when_a_second_one_may_start(tmp_path: Path) -> None:
    for _ in range(3):
        hosting = Hosting(tmp_path)
        hosting.start()
        hosting.counters()
        hosting.stop()
    with pytest.raises(HostUnavailable):
        Connection(hosting.endpoint)
