"""What people are told about models, leases and clients. Reads the books, writes none."""

from __future__ import annotations

from collections.abc import Iterable

from lunashm import protocol as p
from lunashm.host.catalog import Catalog, Generation
from lunashm.host.leases import Client, Clock, Lease, LeaseTable
from lunashm.host.loading import Job


class Reports:
    """Ages and durations are in seconds on ``clock``."""

    def __init__(self, catalog: Catalog, leases: LeaseTable, clock: Clock, rung: str) -> None:
        self._catalog = catalog
        self._leases = leases
        self._clock = clock
        self._rung = rung

    def lease(self, client: Client, lease: Lease) -> p.LeaseInfo:
        return p.LeaseInfo(
            lease=lease.id,
            client=client.id,
            pid=client.info.pid,
            kind=client.info.kind,
            label=client.info.label,
            model=self._catalog.names()[lease.generation],
            generation=lease.generation,
            held_s=self._clock() - lease.since,
        )

    def leases(self, generation_id: int) -> tuple[p.LeaseInfo, ...]:
        return tuple(self.lease(client, lease) for client, lease in self._leases.of_generation(generation_id))

    def client(self, client: Client) -> p.ClientStatus:
        now = self._clock()
        leases = tuple(self.lease(client, lease) for lease in client.leases.values())
        watched = "process" if client.watched else "renewal"
        return p.ClientStatus(client.id, client.info, watched, now - client.since, now - client.last_seen, leases)

    def clients(self) -> tuple[p.ClientStatus, ...]:
        return tuple(map(self.client, self._leases.clients))

    def model(self, generation: Generation) -> p.ModelInfo:
        holders = {client.id for client, _ in self._leases.of_generation(generation.id)}
        return self._catalog.describe(generation, clients=len(holders))

    def job(self, job: Job) -> p.ModelInfo:
        """A model that is still loading; its sizes are the file's."""
        return p.ModelInfo(
            name=job.name, path=job.source.path, digest="", generation=0, state="loading", rung=self._rung,
            dtypes={}, tensors=len(job.specs), nbytes=job.source.size, memory_nbytes=0, loaded_nbytes=job.done,
            clients=0, saved=0, until="loading", load_s=self._clock() - job.started, rules=job.rules,
        )  # fmt: skip

    def models(self, jobs: Iterable[Job]) -> tuple[p.ModelInfo, ...]:
        return (*map(self.model, self._catalog.all), *map(self.job, jobs))
