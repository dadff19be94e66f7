"""What a session has of one host: being known to it, and what it lends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lunashm.client.connection import Connection
from lunashm.client.watch import HostWatch
from lunashm.memory import Mapping
from lunashm.protocol import Attached, HostInfo


@dataclass
class Registration:
    """Being known to one host. ``valid`` until that host says it does not know us."""

    connection: Connection
    client: str
    host: HostInfo
    renew_every_s: float
    epoch: int
    next_renewal: float
    valid: bool = True
    watch: HostWatch | None = None

    @property
    def live(self) -> bool:
        return self.valid and self.connection.alive

    def drop(self, reason: str) -> None:
        """The host counts us no more. ``reason``: "it ..."."""
        self.valid = False
        if self.watch is not None:
            self.watch.revoke(reason)


class Lent(NamedTuple):
    """What one attach brought: the mapped segments that a lease covers, and the epoch it belongs to.

    ``watch``: what to ask before and after each use of memory that dies with its host; None for any other.
    """

    reply: Attached
    mappings: tuple[Mapping, ...]
    epoch: int
    watch: HostWatch | None


class Hold:
    """Stands for one lease: the mappings it covers keep this alive, and nothing else does."""

    __slots__ = ("__weakref__",)
