"""All memory the host owns, and when it goes: I2 lives here. Knows no files, no sockets, no processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from lunashm import protocol as p
from lunashm.host.catalog import Catalog, Generation, State
from lunashm.host.leases import Lease, LeaseTable
from lunashm.host.reports import Reports
from lunashm.host.tickets import Tickets

log = logging.getLogger(__name__)


class Arena:
    """``publish`` tells everybody of each lease and each generation that comes or goes."""

    def __init__(
        self,
        catalog: Catalog,
        leases: LeaseTable,
        tickets: Tickets,
        reports: Reports,
        publish: Callable[[p.Event], None],
    ) -> None:
        self._catalog = catalog
        self._leases = leases
        self._tickets = tickets
        self._reports = reports
        self._publish = publish

    def add(self, generation: Generation) -> None:
        self._catalog.add(generation)
        self._publish(p.ModelReady(self._reports.model(generation)))

    def grant(self, client_id: str, generation: Generation) -> tuple[Lease, tuple[p.Handle, ...], bytes]:
        """A lease, the handles it covers, and the ticket for their descriptors, empty where there are none.

        Raises NotRegistered.
        """
        handles = tuple(segment.export() for segment in generation.segments)
        descriptors = any(segment.descriptor() is not None for segment in generation.segments)
        lease = self._leases.grant(client_id, generation.id)
        client = self._leases.renew(client_id)
        pid = client.info.pid if client.watched else None
        ticket = self._tickets.issue(lease.id, generation.segments, pid) if descriptors else b""
        info = self._reports.lease(client, lease)
        log.info("lease %d granted: model=%s client=%s pid=%d", lease.id, info.model, info.client, info.pid)
        self._publish(p.LeaseGranted(info))
        return lease, handles, ticket

    def end(self, leases: Iterable[Lease], reason: str) -> None:
        """Leases that the table has let go of: tell of them all, then free what no other lease names."""
        names = self._catalog.names()
        generations = set()
        for lease in leases:
            self._tickets.cancel(lease.id)
            log.info("lease %d ended: model=%s %s", lease.id, names[lease.generation], reason)
            self._publish(p.LeaseEnded(lease.id, names[lease.generation], reason))
            generations.add(lease.generation)
        for generation_id in sorted(generations):
            self._free_if_unused(self._catalog.get(generation_id))

    def drain(self, generation: Generation) -> bool:
        """Lend it no more; free it as soon as nobody holds it. Returns whether it was freed now."""
        generation.state = State.DRAINING
        return self._free_if_unused(generation)

    def close(self) -> None:
        """Give all memory back. Clients keep what they have mapped."""
        self._tickets.clear()
        for generation in self._catalog.all:
            self._free(generation)

    def _free_if_unused(self, generation: Generation) -> bool:
        if generation.state is not State.DRAINING or self._leases.of_generation(generation.id):
            return False  # I2: a live lease names this generation
        name = self._catalog.names()[generation.id]
        self._free(generation)
        log.info("generation %d freed: %s, %.2f GB", generation.id, name, generation.memory_nbytes / 1e9)
        self._publish(p.ModelFreed(name, generation.id, generation.memory_nbytes))
        return True

    def _free(self, generation: Generation) -> None:
        self._catalog.remove(generation.id)
        for segment in generation.segments:
            segment.free()
