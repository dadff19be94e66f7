"""What the host does for each request: pure of sockets, one thread. Answers go to an ``Outbox``, work to an executor.

``handle`` answers now or parks the request with a load job; ``finish`` is called when a job ends; ``tick`` lets
time pass.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import Protocol

from lunashm import __version__
from lunashm import protocol as p
from lunashm.errors import HostLost, LunashmError, ModelInUse, ModelNotFound, NotRegistered, SettingsError
from lunashm.host.arena import Arena
from lunashm.host.board import Snapshot
from lunashm.host.catalog import Catalog, Generation, State
from lunashm.host.leases import Client, Clock, Lease, LeaseTable
from lunashm.host.loading import Job, Outcome, Waiter
from lunashm.host.loads import Loads
from lunashm.host.reports import Reports
from lunashm.host.tickets import Tickets
from lunashm.host.timings import Timings
from lunashm.memory import Rung
from lunashm.process import namespace

log = logging.getLogger(__name__)

RENEWALS_PER_TTL = 3


class Outbox(Protocol):
    """Where answers and events go."""

    def reply(self, route: bytes, message_id: int, message: p.Message) -> bool:
        """Whether it is on its way; False where nobody is there to read it."""

    def publish(self, event: p.Message) -> None: ...


class Service:
    """One host. ``submit`` runs a job elsewhere and has :meth:`finish` called with its result in this thread, later.

    Raises SettingsError for a root that no message could name.
    """

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
        device_name: str = "",
        rung_reason: str = "",
    ) -> None:
        self.info = p.HostInfo(
            host_id=secrets.token_hex(8),
            pid=os.getpid(),
            pid_namespace=namespace(),
            device=rung.device,
            device_name=device_name or rung.device,
            rung=rung.name,
            rung_reason=rung_reason,
            endpoint=endpoint,
            version=__version__,
            roots=tuple(map(_real_root, roots)),
            started_at=time.time(),
        )
        self.counters: Counter[str] = Counter()
        self.timings = Timings()
        self.stopping = False
        self._rung = rung
        self._outbox = outbox
        self._clock = clock
        self._started = clock()
        self._catalog = Catalog()
        self._leases = LeaseTable(ttl_s, clock)
        self._tickets = Tickets(clock)
        self._reports = Reports(self._catalog, self._leases, clock, rung.name)
        self._arena = Arena(self._catalog, self._leases, self._tickets, self._reports, outbox.publish)
        self._loads = Loads(
            roots=self.info.roots, catalog=self._catalog, arena=self._arena, reports=self._reports, submit=submit,
            reply=self._answer_waiter, refuse=self._refusal, admitted=self._admitted, publish=outbox.publish,
            clock=clock,
        )  # fmt: skip

    # -- requests --------------------------------------------------------------------------------------------------

    def handle(self, route: bytes, message_id: int, request: p.Request) -> None:
        """Answer one request, now or later; every request gets exactly one answer."""
        self.counters[f"request.{type(request).__name__}"] += 1
        since = self._clock()
        try:
            answer = self._answer(route, message_id, request, since)
        except LunashmError as exc:
            log.info("%s refused: %s", type(request).__name__, exc)
            answer = self._refusal(exc)
        if answer is not None:
            self._reply(route, message_id, answer)
        if isinstance(answer, p.Attached):
            self.timings = self.timings.attached(self._clock() - since, waited=False)

    def _answer(self, route: bytes, message_id: int, request: p.Request, since: float) -> p.Message | None:
        match request:
            case p.Renew(client):
                self._leases.renew(client)
                return p.Done()
            case p.Attach(client):
                self._leases.renew(client)
                return self._loads.want(Waiter(route, message_id, request, since))
            case p.Load():
                return self._loads.want(Waiter(route, message_id, request, since))
            case p.Detach(client, lease):
                self._arena.end([self._leases.release(client, lease)], "released")
                return p.Done()
            case p.Unregister(client):
                self.drop_client(client, "left")
                return p.Done()
            case p.Unload(name, force):
                return self._unload(name, force)
            case p.ListModels():
                return p.Models(self._reports.models(self._loads.jobs))
            case p.ShowModel(name):
                generation = self._catalog.find(name)
                leases = self._reports.leases(generation.id)
                return p.ModelDetail(self._reports.model(generation), generation.manifest, leases)
            case p.ListClients():
                return p.Clients(self._reports.clients())
            case p.GetStatus():
                return self.status()
            case p.Shutdown():
                self.stopping = True
                return p.Done()
            case p.Register():
                raise NotRegistered("register goes through Service.register, which needs to know if the pid is watched")

    def _refusal(self, error: LunashmError) -> p.ErrorReply:
        self.counters[f"error.{error.code}"] += 1
        return p.ErrorReply(error.code, error.message)

    def _answer_waiter(self, waiter: Waiter, message: p.Message) -> None:
        self._reply(waiter.route, waiter.message_id, message)
        if isinstance(message, p.Attached):
            self.timings = self.timings.attached(self._clock() - waiter.since, waited=True)

    def _admitted(self, generation: Generation) -> None:
        self.timings = self.timings.loaded(generation.load_s, generation.manifest.source.size)

    def _reply(self, route: bytes, message_id: int, message: p.Message) -> None:
        delivered = self._outbox.reply(route, message_id, message)
        if isinstance(message, p.Attached) and not delivered:
            lease = self._leases.revoke(message.lease)
            self._lose([lease] if lease is not None else [], "undelivered")

    def finish(self, job: Job, result: Outcome | BaseException) -> None:
        """A job ended."""
        self._loads.finish(job, result)

    def redeem(self, ticket: bytes, pid: int) -> tuple[int, ...]:
        """The descriptors that process ``pid`` asks for; they stay the host's. Raises TicketRefused."""
        self.counters["request.Redeem"] += 1
        descriptors = (segment.descriptor() for segment in self._tickets.redeem(ticket, pid))
        return tuple(descriptor for descriptor in descriptors if descriptor is not None)

    def register(self, info: p.ClientInfo, watched: bool) -> tuple[Client, p.Registered]:
        """Admit a client. ``watched``: the caller will call :meth:`drop_client` when its process ends."""
        self.counters["request.Register"] += 1
        client = self._leases.register(info, watched)
        log.info("client %s registered: pid=%d %s %s watched=%s", client.id, info.pid, info.kind, info.label, watched)
        self._outbox.publish(p.ClientJoined(client.id, info))
        ttl = self._leases.ttl_s
        return client, p.Registered(client.id, self.info, ttl, ttl / RENEWALS_PER_TTL)

    def drop_client(self, client_id: str, reason: str) -> None:
        """End everything a client had: leases, and requests that still wait (these hear of it)."""
        client = self._leases.drop(client_id)
        if client is None:
            return
        log.info("client %s gone: pid=%d %s, %d leases", client_id, client.info.pid, reason, len(client.leases))
        self.counters[f"client.{_word(reason)}"] += 1
        self._outbox.publish(p.ClientLeft(client_id, client.info.pid, reason))
        why = NotRegistered(f"client {client_id} is not registered any more ({reason}); register, then attach again")
        self._loads.drop_client(client_id, why)
        if reason == "left":
            self._arena.end(client.leases.values(), reason)
        else:
            self._lose(client.leases.values(), reason)

    def _lose(self, leases: Collection[Lease], reason: str) -> None:
        """Leases that no client gave back."""
        if leases:
            self.counters[f"lease.{_word(reason)}"] += len(leases)
        self._arena.end(leases, reason)

    # -- unloading -------------------------------------------------------------------------------------------------

    def _unload(self, name: str, force: bool) -> p.Message:
        job = self._loads.cancel(name)
        try:
            generation = self._catalog.find(name)
        except ModelNotFound:
            if job is None:
                raise
            return p.Unloaded(self._reports.job(job), freed=True, told=())
        held = self._reports.leases(generation.id)
        if held and not force and generation.state is State.READY:
            if job is not None:  # the same file in other dtypes: that much could be done
                return p.Unloaded(self._reports.job(job), freed=True, told=())
            who = ", ".join(sorted({f"{i.label or i.kind} (pid {i.pid})" for i in held}))
            raise ModelInUse(f"{name} is in use by {who}; close them, or ask them to let go with --force")
        info = self._reports.model(generation)
        if held:
            self._outbox.publish(p.UnloadRequested(info.name, generation.id))
        return p.Unloaded(info, freed=self._arena.drain(generation), told=held)

    # -- time ------------------------------------------------------------------------------------------------------

    def tick(self) -> None:
        """Let time pass: silent clients expire, parked requests reach their deadline, progress is told."""
        for client in self._leases.silent():
            self.drop_client(client.id, f"silent for {self._leases.ttl_s:g} s")
        self._tickets.expire()
        self._loads.tick()

    @property
    def busy(self) -> bool:
        """Whether ``tick`` has something to tell soon."""
        return bool(self._loads.jobs)

    def farewell(self, reason: str) -> None:
        """Tell everyone that this host stops, and whoever waits that it waits in vain."""
        self._outbox.publish(p.HostStopping(self.info.host_id, reason))
        self._loads.close(HostLost(f"the host stopped ({reason}) before the model was loaded; start it again"))

    def close(self) -> None:
        """Give all memory back. Clients keep what they have mapped, where it outlives us."""
        self._arena.close()

    def snapshot(self) -> Snapshot:
        """What other threads may see; nothing here changes it afterwards."""
        return Snapshot(self.status(), self.timings, self._clock())

    def status(self) -> p.Status:
        models = self._reports.models(self._loads.jobs)
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


def _word(reason: str) -> str:
    """What a counter is called after: one word, whatever the reason says beside it."""
    return reason.partition(" for ")[0].replace(" ", "_")


def _real_root(root: str) -> str:
    """Clients are told the roots, so their names have to be text."""
    real = os.path.realpath(root)
    try:
        real.encode()
    except UnicodeEncodeError:
        raise SettingsError(f"root {real!r} has a name that is not UTF-8; rename it, or choose another") from None
    return real
