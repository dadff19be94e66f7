"""Who may still touch the arena. Knows nothing of sockets, memory or processes; time is an argument.

A lease ends by release, by its client leaving, or by its client not renewing (only for clients whose process the
host cannot watch itself). Nothing else ends one, so memory that a lease names is never freed early (I2).
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from lunashm.errors import LeaseUnknown, NotRegistered
from lunashm.protocol import ClientInfo

Clock = Callable[[], float]


@dataclass(frozen=True)
class Lease:
    """The right of ``client`` to stay attached to one generation."""

    id: int
    client: str
    generation: int
    since: float


@dataclass
class Client:
    """``watched``: the host sees this process end by itself, so silence does not expire it."""

    id: str
    info: ClientInfo
    watched: bool
    since: float
    last_seen: float
    leases: dict[int, Lease] = field(default_factory=dict)


class LeaseTable:
    """All clients and leases of one host. ``ttl_s``: how long an unwatched client may stay silent."""

    def __init__(self, ttl_s: float, clock: Clock) -> None:
        self.ttl_s = ttl_s
        self._clock = clock
        self._clients: dict[str, Client] = {}
        self._ids = itertools.count(1)

    def __len__(self) -> int:
        return sum(len(client.leases) for client in self._clients.values())

    @property
    def clients(self) -> list[Client]:
        return list(self._clients.values())

    def register(self, info: ClientInfo, watched: bool) -> Client:
        now = self._clock()
        client = Client(secrets.token_hex(8), info, watched, now, now)
        self._clients[client.id] = client
        return client

    def renew(self, client_id: str) -> Client:
        """Note a sign of life. Raises NotRegistered."""
        client = self._clients.get(client_id)
        if client is None:
            raise NotRegistered(f"client {client_id} is not registered with this host; register, then attach again")
        client.last_seen = self._clock()
        return client

    def grant(self, client_id: str, generation: int) -> Lease:
        """Raises NotRegistered."""
        client = self.renew(client_id)
        lease = Lease(next(self._ids), client_id, generation, self._clock())
        client.leases[lease.id] = lease
        return lease

    def release(self, client_id: str, lease_id: int) -> Lease:
        """Raises NotRegistered, or LeaseUnknown for a lease that ended or is another client's."""
        client = self.renew(client_id)
        try:
            return client.leases.pop(lease_id)
        except KeyError:
            raise LeaseUnknown(f"client {client_id} holds no lease {lease_id}; it was released already") from None

    def revoke(self, lease_id: int) -> Lease | None:
        """End a lease that its client never heard of; None if it is unknown."""
        for client in self._clients.values():
            if lease_id in client.leases:
                return client.leases.pop(lease_id)
        return None

    def drop(self, client_id: str) -> Client | None:
        """Forget a client and end all its leases; None if it is unknown."""
        return self._clients.pop(client_id, None)

    def silent(self) -> list[Client]:
        """Unwatched clients that have not renewed within the ttl; they stay until dropped."""
        limit = self._clock() - self.ttl_s
        return [client for client in self._clients.values() if not client.watched and client.last_seen < limit]

    def of_generation(self, generation: int) -> list[tuple[Client, Lease]]:
        return [
            (client, lease)
            for client in self._clients.values()
            for lease in client.leases.values()
            if lease.generation == generation
        ]
