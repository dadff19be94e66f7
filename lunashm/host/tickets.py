"""Who may fetch which descriptors, once. Pure book-keeping: knows no sockets; time is an argument.

A ticket travels to a client with its lease, and the client presents it at another socket. It is good for one use within
:data:`TICKET_S`, for the process it was made for where the host can see that process, and never longer than its lease.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from lunashm.errors import TicketRefused
from lunashm.host.leases import Clock
from lunashm.memory import Segment

TICKET_S = 30.0
TICKET_NBYTES = 32


@dataclass(frozen=True)
class Ticket:
    """``pid``: whose it is; None for a client that the host cannot see."""

    lease: int
    segments: tuple[Segment, ...]
    pid: int | None
    issued: float


class Tickets:
    """All that are neither used nor expired: one per lease at most."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tickets: dict[bytes, Ticket] = {}

    def __len__(self) -> int:
        return len(self._tickets)

    def issue(self, lease: int, segments: tuple[Segment, ...], pid: int | None) -> bytes:
        name = secrets.token_bytes(TICKET_NBYTES)
        self._tickets[name] = Ticket(lease, segments, pid, self._clock())
        return name

    def redeem(self, name: bytes, pid: int) -> tuple[Segment, ...]:
        """Use a ticket up; ``pid``: who presents it. In anybody else's hands than its owner's it stays good.

        Raises TicketRefused.
        """
        ticket = self._tickets.get(name)
        if ticket is None:
            raise TicketRefused(
                f"the host knows no such ticket: it was used, is older than {TICKET_S:g} s, its lease has ended, or "
                "it is another host's; attach again"
            )
        if ticket.pid is not None and ticket.pid != pid:
            raise TicketRefused(
                f"the ticket of lease {ticket.lease} is pid {ticket.pid}'s, not pid {pid}'s; attach in the process "
                "that uses the weights, after a fork too"
            )
        del self._tickets[name]
        age = self._clock() - ticket.issued
        if age > TICKET_S:
            raise TicketRefused(
                f"the ticket of lease {ticket.lease} is {age:.0f} s old, it was good for {TICKET_S:g} s; attach again"
            )
        return ticket.segments

    def cancel(self, lease: int) -> None:
        """The lease has ended, and its ticket with it."""
        self._tickets = {name: ticket for name, ticket in self._tickets.items() if ticket.lease != lease}

    def expire(self) -> None:
        """Forget what is too old to be used."""
        limit = self._clock() - TICKET_S
        self._tickets = {name: ticket for name, ticket in self._tickets.items() if ticket.issued >= limit}

    def clear(self) -> None:
        self._tickets.clear()
