"""The HTTP edge, in threads of the test, with hosts whose loop runs in another."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from lunashm import protocol as p
from lunashm.errors import SettingsError
from lunashm.host import scrape as edge
from lunashm.host.address import Address
from lunashm.host.board import Board, Snapshot
from lunashm.host.scrape import Scrape
from lunashm.host.timings import Timings
from tests import checkpoints
from tests.fakes import HeapRung, HeapSegment
from tests.host.test_server import register
from tests.hosting import Hosting
from tests.messages import HOST, MODEL
from tests.scraping import fetch, scrape
from tests.waiting import until

LOOPBACK = Address.parse("0")


def snapshot() -> Snapshot:
    return Snapshot(p.Status(HOST, 60.0, (MODEL,), 2, 3, 768, 512, 1 << 34, {}), Timings(), time.monotonic())


@contextlib.contextmanager
def serving(address: Address = LOOPBACK) -> Iterator[Scrape]:
    """Nobody's host, and no thread of it left afterwards."""
    before = set(threading.enumerate())
    found = Scrape(address)
    with found.serving(Board(snapshot)):
        yield found
    assert set(threading.enumerate()) <= before


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2].partition("/")[0])


def connect(url: str, said: bytes = b"") -> socket.socket:
    peer = socket.create_connection(("127.0.0.1", port_of(url)), timeout=20)
    peer.sendall(said)
    return peer


@pytest.fixture
def hosting(tmp_path: Path) -> Iterator[Hosting]:
    hosting = Hosting(tmp_path, metrics=LOOPBACK)
    hosting.start()
    yield hosting
    hosting.stop()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lunashm-metrics")]


# -- the port ----------------------------------------------------------------------------------------------------------


def test_page_is_there_while_it_is_served_and_not_afterwards() -> None:
    with serving() as found:
        assert found.url.startswith("http://127.0.0.1:")
        assert found.url.endswith("/metrics")
        page = scrape(found.url)
        assert (page.value("clients"), page.value("leases"), page.value("saved_bytes")) == (2, 3, 512)
    with pytest.raises(ConnectionRefusedError):
        connect(found.url)
    with serving(Address("127.0.0.1", port_of(found.url))) as again:
        assert again.url == found.url, "the port can be taken again at once"


def test_only_the_loopback_hears_unless_told_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serving() as found, socket.socket() as peer:
        assert caplog.messages == []
        with pytest.raises(ConnectionRefusedError):
            peer.connect(("127.0.0.2", port_of(found.url)))  # another address of this machine


def test_address_of_the_network_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serving(Address.parse("0.0.0.0:0")) as found:
        (warning,) = caplog.messages
        assert "open to the network, without authentication" in warning
        assert scrape(found.url.replace("0.0.0.0", "127.0.0.2")).value("clients") == 2


@pytest.mark.skipif(not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists(), reason="no IPv6 on this machine")
def test_ipv6_loopback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serving(Address.parse("[::1]:0")) as found:
        assert found.url.startswith("http://[::1]:")
        assert scrape(found.url).value("clients") == 2
        assert caplog.messages == []


def test_port_in_use_names_who_has_it() -> None:
    with serving() as found, pytest.raises(SettingsError) as error, serving(Address("127.0.0.1", port_of(found.url))):
        pass
    assert f"cannot serve metrics at 127.0.0.1:{port_of(found.url)}: pid {os.getpid()} (" in str(error.value)
    assert "choose another --metrics" in str(error.value)


@pytest.mark.parametrize(("host", "why"), [("192.0.2.1", "assign requested address"), ("no.such.host.invalid", ""),
                                           ("x" * 300, "")])  # fmt: skip
def test_address_that_is_not_ours_is_a_settings_error(host: str, why: str) -> None:
    with pytest.raises(SettingsError, match=f"cannot serve metrics at {host}:0: .*{why}"), serving(Address(host, 0)):
        pass


# -- what is asked -----------------------------------------------------------------------------------------------------


def test_both_text_formats_and_compression_are_offered() -> None:
    with serving() as found:
        assert fetch(found.url, [("Accept", "application/openmetrics-text")]).endswith("# EOF\n")
        request = urllib.request.Request(found.url, headers={"Accept-Encoding": "gzip"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert answer.headers["Content-Encoding"] == "gzip"


def test_nothing_can_be_written() -> None:
    with serving() as found, pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(found.url, data=b"x", timeout=20)
    assert error.value.code in {405, 501}


@pytest.mark.parametrize("said", [b"\0" * 1000, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000])
def test_nonsense_harms_nobody(said: bytes) -> None:
    with serving() as found:
        with connect(found.url) as peer, contextlib.suppress(OSError):
            peer.sendall(said)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(4096):
                pass
        assert scrape(found.url).value("clients") == 2


# -- who is slow, who is many ------------------------------------------------------------------------------------------


def test_who_says_nothing_or_does_not_read_keeps_nobody_else_out() -> None:
    with serving() as found, contextlib.ExitStack() as stack:
        for _ in range(2 * edge.MOST_OPEN):
            stack.enter_context(connect(found.url))
            stack.enter_context(connect(found.url, b"GET /metrics HTTP/1.1\r\nX: "))
        assert scrape(found.url).value("clients") == 2
        threads = [thread for thread in threading.enumerate() if "process_request" in thread.name]
        assert len(threads) <= edge.MOST_OPEN + 1, "one may be about to end"


def test_who_is_late_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "PATIENCE_S", 0.05)
    monkeypatch.setattr(edge, "_LOOK_S", 0.02)
    with serving() as found, connect(found.url, b"GET /metrics HTTP/1.1\r\nX: ") as peer:
        assert peer.recv(1) == b""


def test_stop_waits_for_nobody() -> None:
    with contextlib.ExitStack() as stack:
        with serving() as found:
            silent = stack.enter_context(connect(found.url))
            until(lambda: any("process_request" in t.name for t in threading.enumerate()), "it is heard")
            started = time.monotonic()
        assert time.monotonic() - started < edge.PATIENCE_S / 2
        assert silent.recv(1) == b""


def test_flood_waits_in_the_kernels_queue() -> None:
    """What bounds the interpreter's time that scrapes take from the event loop."""
    with serving() as found:
        started = time.monotonic()
        for _ in range(10):
            fetch(found.url)
        assert time.monotonic() - started >= 9 / edge.PER_SECOND


# -- with a host -------------------------------------------------------------------------------------------------------


def test_host_that_cannot_serve_metrics_does_not_start(hosting: Hosting, tmp_path: Path) -> None:
    second = Hosting(tmp_path, metrics=Address("127.0.0.1", port_of(hosting.url)), device="GPU-0")
    told = []
    with pytest.raises(SettingsError, match="listens there"):
        second.server.run(told.append)
    assert told == []
    assert not second.endpoint.socket_path.exists()


def test_loop_answers_while_scrapers_flood_and_dawdle(hosting: Hosting) -> None:
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError), connect(hosting.url, b"GET / HTTP/1.0\r\n\r\n"):
                pass

    threads = [threading.Thread(target=flood) for _ in range(4)]
    with hosting.client() as client, contextlib.ExitStack() as stack:
        name = register(client)
        for _ in range(8):
            stack.enter_context(connect(hosting.url))
        for thread in threads:
            thread.start()
        try:
            for _ in range(200):
                client.request(p.Renew(name), timeout_s=5)
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_what_happened_last_is_seen_soon_although_the_loop_is_idle_then(hosting: Hosting) -> None:
    """Left alone it would turn every 5 s."""
    with hosting.client() as client:
        name = register(client)
        for _ in range(10):
            client.request(p.Renew(name))
        until(lambda: scrape(hosting.url).value("requests_total", type="Renew") == 10, "all are seen", 3)


class Gated(HeapRung):
    """Grants no memory until it is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def allocate(self, nbytes: int) -> HeapSegment:
        assert self.gate.wait(20)
        return super().allocate(nbytes)


def test_load_is_seen_while_it_goes_on(tmp_path: Path) -> None:
    checkpoints.write(tmp_path / "m.safetensors", checkpoints.SMALL)
    rung = Gated()
    hosting = Hosting(tmp_path, rung=rung, metrics=LOOPBACK)
    hosting.start()
    replies: list[p.Message] = []

    def attach() -> None:
        with hosting.client() as client:
            replies.append(client.request(p.Attach(register(client), str(tmp_path / "m.safetensors"), (), 20.0)))

    waiting = threading.Thread(target=attach)
    waiting.start()
    try:
        until(lambda: scrape(hosting.url).value("models", state="loading") == 1, "the load is seen")
        page = scrape(hosting.url)
        assert (page.labels("model_bytes"), page.value("leases")) == ([], 0)
        assert page.total("attach_seconds_count") == 0
        rung.gate.set()
        waiting.join()
        assert isinstance(replies[0], p.Attached)
        until(lambda: scrape(hosting.url).value("models", state="ready") == 1, "it is loaded")
        page = scrape(hosting.url)
        assert page.value("attach_seconds_count", waited="yes") == 1
        assert page.value("attach_seconds_sum", waited="yes") >= page.value("load_seconds_sum") > 0
    finally:
        rung.gate.set()
        waiting.join()
        hosting.stop()


def test_no_scrape_is_torn(hosting: Hosting, tmp_path: Path) -> None:
    """Between two requests of one client: what was attached and not detached is leased, and was timed."""
    checkpoints.write(tmp_path / "m.safetensors", checkpoints.SMALL)
    stop = threading.Event()

    def work() -> None:
        with hosting.client() as client:
            name = register(client)
            while not stop.is_set():
                attached = client.request(p.Attach(name, str(tmp_path / "m.safetensors"), (), 20.0))
                assert isinstance(attached, p.Attached)
                client.request(p.Detach(name, attached.lease))

    worker = threading.Thread(target=work)
    worker.start()
    seen = set()
    try:
        until(lambda: scrape(hosting.url).total("attach_seconds_count"), "it is at work")

        def moved_on() -> bool:
            page = scrape(hosting.url)
            attached = page.value("requests_total", type="Attach")
            assert page.total("attach_seconds_count") + page.value("models", state="loading") == attached
            assert page.value("leases") == attached - page.value("requests_total", type="Detach")
            seen.add(attached)
            return len(seen) > 5

        until(moved_on, "snapshots follow each other")
    finally:
        stop.set()
        worker.join()
