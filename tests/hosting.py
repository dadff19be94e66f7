"""A real host, sockets and all, in a thread of the test: quick to start, and its insides can be reached."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from lunashm import protocol as p
from lunashm.client.connection import Connection
from lunashm.host.address import Address
from lunashm.host.scrape import Scrape
from lunashm.host.server import Server
from lunashm.memory import Rung
from lunashm.paths import Endpoint
from tests.fakes import HeapRung


class Hosting:
    """A server that runs in a thread until it is told to stop. Memory is a fake unless a rung is given."""

    def __init__(
        self,
        root: Path,
        ttl_s: float = 15.0,
        rung: Rung | None = None,
        metrics: Address | None = None,
        device: str = "cpu",
    ) -> None:
        self.root = root
        self.rung = rung or HeapRung()
        self.endpoint = Endpoint.for_device(device)
        self._scrape = Scrape(metrics) if metrics is not None else None
        self.server = Server(
            rung=self.rung, endpoint=self.endpoint, roots=(str(root),), ttl_s=ttl_s,
            reader=self._scrape.serving if self._scrape is not None else None,
        )  # fmt: skip
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self.server.run, args=(lambda info: self._ready.set(),), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        self.server.stop()
        self._thread.join(10)
        assert not self._thread.is_alive()

    @property
    def url(self) -> str:
        """Of its metrics."""
        assert self._scrape is not None
        return self._scrape.url

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    @contextlib.contextmanager
    def client(self) -> Iterator[Connection]:
        connection = Connection(self.endpoint)
        try:
            yield connection
        finally:
            connection.close()

    def counters(self) -> dict[str, int]:
        with self.client() as client:
            status = client.request(p.GetStatus())
            assert isinstance(status, p.Status)
            return status.counters
