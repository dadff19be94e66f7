"""Hosts over time, for ``top``: who is there, what each says now, who is gone or silent. Shows nothing.

A connection is kept for each; no host counts it as a client. A host that does not answer is not asked again before it
has.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, replace

from lunashm import protocol as p
from lunashm.client.connection import Connection
from lunashm.errors import HostLost, HostTimeout, LunashmError, from_code
from lunashm.paths import Endpoint, find_host, nobody_at


@dataclass(frozen=True)
class Seen:
    """``trouble``: why there is no fresh answer; ``status`` and ``clients`` are then the last one, if there was one."""

    endpoint: Endpoint
    status: p.Status | None
    clients: tuple[p.ClientStatus, ...]
    trouble: LunashmError | None


class Hosts:
    """``find``: the endpoints that have a host now; those seen before are looked at, too."""

    def __init__(self, find: Callable[[], list[Endpoint]]) -> None:
        self._find = find
        self._links: dict[Endpoint, _Link] = {}

    def look(self, patience_s: float) -> list[Seen]:
        """All of them within ``patience_s``, whatever state they are in."""
        for endpoint in self._find():
            if endpoint not in self._links:
                self._links[endpoint] = _Link(endpoint)
        links = list(self._links.values())
        for link in links:
            link.ask()
        deadline = time.monotonic() + patience_s
        return [link.hear(deadline) for link in links]

    def close(self) -> None:
        for link in self._links.values():
            link.close()


class _Link:
    """One endpoint, and whoever serves it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._connection: Connection | None = None
        self._asked: tuple[Future[p.Reply], Future[p.Reply]] | None = None
        self._asked_at = 0.0
        self._seen = Seen(endpoint, None, (), None)

    def ask(self) -> None:
        if self._asked is not None:
            return
        try:
            if self._connection is None:
                self._connection = self._connected()
            self._asked = (self._connection.submit(p.GetStatus()), self._connection.submit(p.ListClients()))
            self._asked_at = time.monotonic()
        except LunashmError as exc:
            self._seen = Seen(self._endpoint, self._seen.status, (), exc)

    def hear(self, deadline: float) -> Seen:
        if self._asked is not None and self._connection is not None:
            try:
                status, clients = (one.result(max(0.0, deadline - time.monotonic())) for one in self._asked)
                self._seen = self._read(status, clients)
            except FutureTimeout:
                since_s, pid = time.monotonic() - self._asked_at, self._connection.host.pid
                silent = f"host pid {pid} has not answered for {since_s:.0f} s; is it stopped or swapping?"
                self._seen = replace(self._seen, trouble=HostTimeout(silent))
                return self._seen
            except LunashmError as exc:
                self._seen = Seen(self._endpoint, self._seen.status, (), exc)
                self.close()
            self._asked = None
        return self._seen

    def _connected(self) -> Connection:
        if find_host(self._endpoint) is None:
            before = self._seen.status
            if before is None:
                raise nobody_at(self._endpoint)
            raise HostLost(f"the host (pid {before.host.pid}) is gone; start it again with: lunashm serve")
        return Connection(self._endpoint)

    def _read(self, status: p.Reply, clients: p.Reply) -> Seen:
        for reply in (status, clients):
            if isinstance(reply, p.ErrorReply):
                raise from_code(reply.code, reply.message)
        if not isinstance(status, p.Status) or not isinstance(clients, p.Clients):
            raise LunashmError("the host answered GetStatus or ListClients with something else")
        return Seen(self._endpoint, status, clients.clients, None)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._asked = None
