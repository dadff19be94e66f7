"""The HTTP edge of the metrics: sockets and threads that read the board, and nothing else of the host.

One thread accepts, at most :data:`PER_SECOND` connections a second, and starts one for each. Of these at most
:data:`MOST_OPEN` live at a time, for :data:`PATIENCE_S` at most: who is silent, or does not read, loses its place,
never somebody else's. So a flood stays in the kernel's queue, and the interpreter, which these threads share with the
event loop, is theirs for a bounded part of the time.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from socketserver import TCPServer, ThreadingMixIn

from prometheus_client import CollectorRegistry, MetricsHandler, ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from lunashm.errors import SettingsError
from lunashm.host import metrics
from lunashm.host.address import Address, holder, is_private
from lunashm.host.board import Board
from lunashm.host.leases import Clock

log = logging.getLogger(__name__)

PER_SECOND = 20
MOST_OPEN = 4
PATIENCE_S = 5.0

_LOOK_S = 1.0
"""How often the accepting thread looks for who is late. It is woken for everything else."""


class Scrape:
    """Metrics at one address, as long as :meth:`serving` is entered; ``url`` says where."""

    def __init__(self, address: Address, clock: Clock = time.monotonic) -> None:
        self.url = ""
        self._address = address
        self._clock = clock

    @contextlib.contextmanager
    def serving(self, board: Board) -> Iterator[None]:
        """Raises SettingsError for an address that cannot be listened at."""
        server = self._listen(MetricsHandler.factory(registry(board, self._clock)))
        self.url = f"http://{Address(self._address.host, server.server_port)}/metrics"
        thread = threading.Thread(target=server.serve_forever, args=(_LOOK_S,), name="lunashm-metrics")
        with contextlib.closing(server):
            thread.start()
            try:
                yield
            finally:
                server.end()
                thread.join()

    def _listen(self, handler: type[BaseHTTPRequestHandler]) -> _Server:
        where = self._address
        try:
            family, _, _, _, found = socket.getaddrinfo(
                where.host, where.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            server = _Server(family, (str(found[0]), where.port), handler)
        except (OSError, UnicodeError) as exc:
            who = holder(where.port) if where.port else ""
            why = f"{who} listens there" if who else getattr(exc, "strerror", None) or str(exc)
            raise SettingsError(
                f"cannot serve metrics at {where}: {why}; choose another --metrics, or 0 for a free port"
            ) from exc
        if not is_private(str(found[0])):
            log.warning("metrics at %s are open to the network, without authentication or encryption: whoever "
                        "reaches the port learns what is loaded and who uses it", where)  # fmt: skip
        return server


def registry(board: Board, clock: Clock = time.monotonic) -> CollectorRegistry:
    """What one host has to tell, itself as a process included; nothing that other code of this process registers."""
    found = CollectorRegistry(auto_describe=True)
    found.register(_Books(board, clock))
    ProcessCollector(registry=found)
    return found


class _Books(Collector):
    def __init__(self, board: Board, clock: Clock) -> None:
        self._board = board
        self._clock = clock

    def collect(self) -> Iterable[Metric]:
        snapshot = self._board.latest  # once: all families of one scrape are of one moment
        return metrics.families(snapshot, max(0.0, self._clock() - snapshot.taken_at))


class _Server(ThreadingMixIn, HTTPServer):
    daemon_threads = False  # or server_close() would not wait for them
    allow_reuse_port = False
    request_queue_size = 16

    def __init__(self, family: int, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = family
        self._ending = threading.Event()
        self._mutex = threading.Lock()
        self._since: dict[socket.socket, float] = {}
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """HTTPServer's own asks DNS for a name that nobody needs."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def end(self) -> None:
        """Accept nobody any more, and drop who is there; from any thread but that of ``serve_forever``."""
        self._ending.set()
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)  # wakes the accepting thread
        self.shutdown()
        self._drop(len(self._since))

    def close(self) -> None:
        self.server_close()  # joins what is left of the threads

    # -- called by socketserver, in the accepting thread but for shutdown_request -----------------------------------

    def get_request(self) -> tuple[socket.socket, object]:
        try:
            return super().get_request()
        except OSError:  # no descriptor to accept with: it stays in the queue, and readable
            self._ending.wait(1.0)
            raise

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        with self._mutex:
            self._since[request] = time.monotonic()
            crowd = len(self._since) - MOST_OPEN
        self._drop(crowd)
        super().process_request(request, client_address)
        self._ending.wait(1 / PER_SECOND)

    def service_actions(self) -> None:
        limit = time.monotonic() - PATIENCE_S
        with self._mutex:
            late = sum(since < limit for since in self._since.values())
        self._drop(late)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        with self._mutex:
            self._since.pop(request, None)
        super().shutdown_request(request)

    def _drop(self, number: int) -> None:
        """The oldest; their threads find their sockets shut, and end."""
        with self._mutex:
            for request in list(self._since)[: max(0, number)]:
                del self._since[request]
                with contextlib.suppress(OSError):  # it has left already
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        log.info("a scrape by %s failed", client_address, exc_info=True)
