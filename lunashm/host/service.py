"""What the host does for each request: pure of sockets, one thread. Answers go to an ``Outbox``, work to an executor.

``handle`` answers now or parks the request with a load job; ``finish`` is called when a job ends; ``tick`` lets
time pass. Invariants I2 (free only without leases) and I3 (a generation never changes) live here.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from lunashm import __version__
from lunashm import protocol as p
from lunashm.errors import (
    LoadCancelled,
    LoadTimeout,
    LunashmError,
    ModelInUse,
    ModelNotReady,
    NotRegistered,
)
from lunashm.host import checkpoint
from lunashm.host.catalog import Catalog, Generation, State
from lunashm.host.leases import Client, Clock, Lease, LeaseTable
from lunashm.host.loading import Job, Outcome, Waiter
from lunashm.manifest import Manifest, check_rules
from lunashm.memory import Rung
from lunashm.process import namespace

log = logging.getLogger(__name__)

RENEWALS_PER_TTL = 3


class Outbox(Protocol):
    """Where answers and events go."""

    def reply(self, route: bytes, message_id: int, message: p.Message) -> None: ...

    def publish(self, event: p.Message) -> None: ...


class Service:
    """One host. ``submit`` runs a job elsewhere and has :meth:`finish` called with its result in this thread."""

    def __init__(
        self,
        *,
        rung: Rung,
        roots: tuple[str, ...],
        endpoint: str,
        ttl_s: float,
        outbox: Outbox,
        submit: Callable[[Job], None],
        clock: Clock = time.monotonic,
    ) -> None:
        self.info = p.HostInfo(
            host_id=secrets.token_hex(8),
            pid=os.getpid(),
            pid_namespace=namespace(),
            device=rung.device,
            rung=rung.name,
            endpoint=endpoint,
            version=__version__,
            roots=tuple(os.path.realpath(root) for root in roots),
            started_at=time.time(),
        )
        self.counters: Counter[str] = Counter()
        self.stopping = False
        self._rung = rung
        self._outbox = outbox
        self._submit = submit
        self._clock = clock
        self._started = clock()
        self._catalog = Catalog()
        self._leases = LeaseTable(ttl_s, clock)
        self._jobs: list[Job] = []

    # -- requests --------------------------------------------------------------------------------------------------

    def handle(self, route: bytes, message_id: int, request: p.Request) -> None:
        """Answer one request, now or later; every request gets exactly one answer."""
        try:
            answer = self._answer(route, message_id, request)
        except LunashmError as exc:
            self.counters[f"error.{exc.code}"] += 1
            log.info("%s refused: %s", type(request).__name__, exc)
            answer = p.ErrorReply(exc.code, exc.message)
        if answer is not None:
            self._outbox.reply(route, message_id, answer)

    def _answer(self, route: bytes, message_id: int, request: p.Request) -> p.Message | None:
        match request:
            case p.Renew(client):
                self._leases.renew(client)
                return p.Done()
            case p.Attach(client):
                self._leases.renew(client)
                return self._want(self._waiter(route, message_id, request))
            case p.Load():
                return self._want(self._waiter(route, message_id, request))
            case p.Detach(client, lease):
                self._end(self._leases.release(client, lease), "released")
                return p.Done()
            case p.Unregister(client):
                self.drop_client(client, "left")
                return p.Done()
            case p.Unload(name, force):
                return self._unload(name, force)
            case p.ListModels():
                return p.Models(self._models())
            case p.ShowModel(name):
                generation = self._catalog.find(name)
                return p.ModelDetail(self._describe(generation), generation.manifest, self._lease_infos(generation.id))
            case p.ListClients():
                return p.Clients(tuple(self._client_status(client) for client in self._leases.clients))
            case p.GetStatus():
                return self._status()
            case p.Shutdown():
                self.stopping = True
                return p.Done()
            case p.Register():
                raise NotRegistered("register goes through Service.register, which needs to know if the pid is watched")

    def register(self, info: p.ClientInfo, watched: bool) -> tuple[Client, p.Registered]:
        """Admit a client. ``watched``: the caller will call :meth:`drop_client` when its process ends."""
        client = self._leases.register(info, watched)
        log.info("client %s registered: pid=%d kind=%s %s watched=%s", client.id, info.pid, info.kind, info.label, watched)
        self._outbox.publish(p.ClientJoined(client.id, info))
        ttl = self._leases.ttl_s
        return client, p.Registered(client.id, self.info, ttl, ttl / RENEWALS_PER_TTL)

    def drop_client(self, client_id: str, reason: str) -> None:
        """End everything a client had: leases, and requests that still wait."""
        client = self._leases.drop(client_id)
        if client is None:
            return
        for job in self._jobs:
            job.waiters = [w for w in job.waiters if getattr(w.request, "client", None) != client_id]
        log.info("client %s gone: pid=%d %s, %d leases", client_id, client.info.pid, reason, len(client.leases))
        self.counters[f"client.{reason.replace(' ', '_')}"] += 1
        self._outbox.publish(p.ClientLeft(client_id, client.info.pid, reason))
        for lease in client.leases.values():
            self._end(lease, reason)

    # -- loading ---------------------------------------------------------------------------------------------------

    def _waiter(self, route: bytes, message_id: int, request: p.Attach | p.Load) -> Waiter:
        return Waiter(route, message_id, request, self._clock() + request.wait_s)

    def _want(self, waiter: Waiter) -> p.Message | None:
        """The model a request names, now if it is loaded, else later: then the waiter is parked with a job."""
        request = waiter.request
        rules = check_rules(request.rules)
        path = checkpoint.resolve(request.path, self.info.roots)
        source = checkpoint.identify(path)
        generation = self._catalog.current(source, rules)
        if generation is not None:
            return self._grant(request, generation, was_loaded=True)
        job = next((j for j in self._jobs if j.source == source and j.would_satisfy(rules)), None)
        if job is None:
            checkpoint.read(path)  # a file that cannot be served is refused before anyone waits for it
            stale = [g for g in self._catalog.of_path(source.path) if source not in g.sources]
            job = Job(source, rules, frozenset(g.manifest.digest for g in stale))
            self._jobs.append(job)
            log.info("loading %s: %.2f GB", source.path, source.size / 1e9)
            self._submit(job)
        if request.wait_s <= 0:
            raise ModelNotReady(f"{job.name} is still being loaded by the host; wait for it, or retry in a moment")
        job.waiters.append(waiter)
        return None

    def finish(self, job: Job, result: Outcome | BaseException) -> None:
        """A job ended. Everyone who waited is answered, or waits for another job if this one does not suit them."""
        self._jobs.remove(job)
        if isinstance(result, Outcome) and job.cancelled.is_set():
            if result.loaded is not None:
                result.loaded.segment.free()
            result = LoadCancelled(f"{job.name} was unloaded while it was loading; load it again if you want it")
        if isinstance(result, Outcome):
            self._admit(job, result)
            for waiter in job.waiters:
                self._retry(waiter)
            return
        error = result if isinstance(result, LunashmError) else LunashmError(f"loading {job.source.path} failed: {result!r}")
        log.warning("loading %s failed: %s", job.source.path, error, exc_info=None if error is result else result)
        self.counters[f"error.{error.code}"] += 1
        self._outbox.publish(p.LoadFailed(job.source.path, error.code, error.message))
        for waiter in job.waiters:
            self._outbox.reply(waiter.route, waiter.message_id, p.ErrorReply(error.code, error.message))

    def _retry(self, waiter: Waiter) -> None:
        try:
            answer = self._want(waiter)
        except LunashmError as exc:
            answer = p.ErrorReply(exc.code, exc.message)
        if answer is not None:
            self._outbox.reply(waiter.route, waiter.message_id, answer)

    def _admit(self, job: Job, outcome: Outcome) -> None:
        """Make a finished load a generation, or fold it into one with the same bytes and dtypes."""
        source = outcome.checkpoint.source
        twin = self._catalog.same_bytes(outcome.digest, job.rules)
        if twin is not None:
            if outcome.loaded is not None:
                outcome.loaded.segment.free()
            log.info("%s holds the bytes of generation %d; sharing it", source.path, twin.id)
        elif outcome.loaded is None:
            log.info("%s is unchanged but wanted in other dtypes; loading those", source.path)
        self._supersede(source.path, outcome.digest)
        if twin is not None:
            twin.sources = {s for s in twin.sources if s.path != source.path} | {source}
            return
        if outcome.loaded is None:
            # same bytes, other dtypes: the file's new stat is all that was learned; the waiters start the real load
            for generation in self._catalog.of_path(source.path):
                generation.sources = {s for s in generation.sources if s.path != source.path} | {source}
            return
        manifest = Manifest(
            name=Path(source.path).name,
            digest=outcome.digest,
            generation=self._catalog.next_id(),
            source=source,
            rules=job.rules,
            tensors=outcome.layout.specs,
            segments=(outcome.layout.nbytes,),
            metadata=outcome.checkpoint.metadata,
        )
        generation = Generation(manifest, (outcome.loaded.segment,), outcome.elapsed_s, self._rung.name, {source})
        self._catalog.add(generation)
        log.info(
            "generation %d ready: %s, %d tensors, %.2f GB in %.1f s (%.2f GB/s), blake3 %s",
            manifest.generation, manifest.name, len(manifest.tensors), manifest.nbytes / 1e9, outcome.elapsed_s,
            source.size / 1e9 / max(outcome.elapsed_s, 1e-9), outcome.digest[:12],
        )  # fmt: skip
        self._outbox.publish(p.ModelReady(self._describe(generation)))

    def _supersede(self, path: str, digest: str) -> None:
        """Generations whose only file now holds other bytes are never lent again."""
        for generation in self._catalog.of_path(path):
            if generation.manifest.digest != digest:
                generation.sources = {s for s in generation.sources if s.path != path}
                if not generation.sources:
                    log.info("generation %d of %s is superseded: the file changed", generation.id, path)
                    self._drain(generation)

    # -- leases and memory -----------------------------------------------------------------------------------------

    def _grant(self, request: p.Attach | p.Load, generation: Generation, was_loaded: bool) -> p.Message:
        if isinstance(request, p.Load):
            return p.Loaded(self._describe(generation), was_loaded)
        lease = self._leases.grant(request.client, generation.id)
        info = self._lease_info(self._leases.renew(request.client), lease)
        log.info("lease %d granted: model=%s client=%s pid=%d", lease.id, info.model, info.client, info.pid)
        self.counters["attach"] += 1
        self._outbox.publish(p.LeaseGranted(info))
        return p.Attached(lease.id, generation.manifest, tuple(segment.export() for segment in generation.segments))

    def _end(self, lease: Lease, reason: str) -> None:
        generation = self._catalog.get(lease.generation)
        log.info("lease %d ended: model=%s %s", lease.id, generation.manifest.name, reason)
        self._outbox.publish(p.LeaseEnded(lease.id, self._catalog.names()[generation.id], reason))
        self._free_if_unused(generation)

    def _drain(self, generation: Generation) -> bool:
        """Lend it no more; free it as soon as nobody holds it. Returns whether it was freed now."""
        generation.state = State.DRAINING
        return self._free_if_unused(generation)

    def _free_if_unused(self, generation: Generation) -> bool:
        if generation.state is not State.DRAINING or self._leases.of_generation(generation.id):
            return False  # I2: a live lease names this generation
        name = self._catalog.names()[generation.id]
        self._catalog.remove(generation.id)
        for segment in generation.segments:
            segment.free()
        log.info("generation %d freed: %s, %.2f GB", generation.id, name, generation.memory_nbytes / 1e9)
        self._outbox.publish(p.ModelFreed(name, generation.id, generation.memory_nbytes))
        return True

    def _unload(self, name: str, force: bool) -> p.Message:
        job = next((j for j in self._jobs if name in (j.name, j.source.path)), None)
        if job is not None:
            job.cancelled.set()
            return p.Unloaded(self._describe_job(job), freed=True, told=())
        generation = self._catalog.find(name)
        held = self._lease_infos(generation.id)
        if held and not force and generation.state is State.READY:
            who = ", ".join(sorted({f"{i.label or i.kind} (pid {i.pid})" for i in held}))
            raise ModelInUse(f"{name} is in use by {who}; close them, or ask them to let go with --force")
        info = self._describe(generation)
        if held:
            self._outbox.publish(p.UnloadRequested(info.name, generation.id))
        return p.Unloaded(info, freed=self._drain(generation), told=held)

    # -- time ------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Let time pass: silent clients expire, parked requests reach their deadline, progress is told."""
        for client in self._leases.silent():
            self.drop_client(client.id, f"silent for {self._leases.ttl_s:g} s")
        now = self._clock()
        for job in self._jobs:
            late = [waiter for waiter in job.waiters if waiter.deadline <= now]
            job.waiters = [waiter for waiter in job.waiters if waiter.deadline > now]
            for waiter in late:
                text = f"{job.name} was not loaded within {waiter.request.wait_s:g} s ({job.done} of {job.total} bytes)"
                error = LoadTimeout(f"{text}; it goes on loading, retry or wait longer")
                self._outbox.reply(waiter.route, waiter.message_id, p.ErrorReply(error.code, error.message))
            elapsed = time.monotonic() - job.started
            self._outbox.publish(p.LoadProgress(job.source.path, job.name, job.done, job.total, elapsed))

    @property
    def busy(self) -> bool:
        """Whether ``tick`` has something to tell soon."""
        return bool(self._jobs)

    def close(self, reason: str) -> None:
        """Tell everyone and give all memory back. Clients keep what they have mapped."""
        self._outbox.publish(p.HostStopping(self.info.host_id, reason))
        for job in self._jobs:
            job.cancelled.set()
        for generation in self._catalog.all:
            for segment in generation.segments:
                segment.free()
            self._catalog.remove(generation.id)

    # -- descriptions ----------------------------------------------------------------------------------------------

    def _lease_info(self, client: Client, lease: Lease) -> p.LeaseInfo:
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

    def _lease_infos(self, generation_id: int) -> tuple[p.LeaseInfo, ...]:
        return tuple(self._lease_info(client, lease) for client, lease in self._leases.of_generation(generation_id))

    def _client_status(self, client: Client) -> p.ClientStatus:
        now = self._clock()
        leases = tuple(self._lease_info(client, lease) for lease in client.leases.values())
        watched = "process" if client.watched else "renewal"
        return p.ClientStatus(client.id, client.info, watched, now - client.since, now - client.last_seen, leases)

    def _describe(self, generation: Generation) -> p.ModelInfo:
        holders = {client.id for client, _ in self._leases.of_generation(generation.id)}
        return self._catalog.describe(generation, clients=len(holders))

    def _describe_job(self, job: Job) -> p.ModelInfo:
        return p.ModelInfo(
            name=job.name, path=job.source.path, digest="", generation=0, state="loading", rung=self._rung.name,
            dtypes={}, tensors=0, nbytes=job.total or job.source.size, memory_nbytes=0, loaded_nbytes=job.done,
            clients=0, saved=0, until="loading", load_s=time.monotonic() - job.started, rules=job.rules,
        )  # fmt: skip

    def _models(self) -> tuple[p.ModelInfo, ...]:
        return (*map(self._describe, self._catalog.all), *map(self._describe_job, self._jobs))

    def _status(self) -> p.Status:
        models = self._models()
        return p.Status(
            host=self.info,
            uptime_s=self._clock() - self._started,
            models=models,
            clients=len(self._leases.clients),
            leases=len(self._leases),
            shared_nbytes=sum(model.memory_nbytes for model in models),
            saved_nbytes=sum(model.saved for model in models),
            free_nbytes=self._rung.free_nbytes(),
            counters=dict(self.counters),
        )
