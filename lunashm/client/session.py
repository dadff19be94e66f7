"""One process as a client of one host: registered once, kept alive, found again when a new host comes up.

Leases follow memory: a lease is released when the last view of its mapping in this process is gone, so no caller can
hold tensors of a model that the host believes free (I2).

LOCKING: views die anywhere, at any allocation, in any thread, so what runs then (``_release``) takes no lock of this
class; the state it reads is one attribute, replaced whole. ``_connecting`` is held while a host is waited for, so
neither the connection's thread nor a property may take it.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future

from lunashm import __version__, protocol
from lunashm.client.connection import REPLY_S, Connection
from lunashm.client.mappings import Mappings
from lunashm.client.registration import Hold, Lent, Registration
from lunashm.client.watch import HostWatch
from lunashm.errors import ForkedProcess, HostLost, HostUnavailable, LunashmError, NotRegistered, TicketRefused
from lunashm.manifest import DtypeRule
from lunashm.memory import rung_of
from lunashm.paths import Endpoint, find_host
from lunashm.process import namespace, start_ticks
from lunashm.protocol import Attached, Event, Handle, HostInfo, Registered, Reply

log = logging.getLogger(__name__)

Listener = Callable[[Event], None]


class Session:
    """Thread-safe. Connects on first use; after a host died it connects to the next one on the next use.

    ``epoch`` counts registrations: an attachment made in an older epoch holds no lease any more.
    """

    def __init__(self, endpoint: Endpoint, *, kind: str, label: str) -> None:
        self.endpoint = endpoint
        self._kind = kind
        self._label = label
        self._pid = os.getpid()
        self._connecting = threading.Lock()
        self._current: Registration | None = None
        self._epoch = 0
        self._mappings = Mappings(endpoint)
        self._listeners: list[Listener] = []
        atexit.register(self.close)

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def host(self) -> HostInfo | None:
        """The host we are registered with, or None. Never blocks."""
        current = self._registration()
        return current.host if current is not None else None

    @property
    def client_id(self) -> str:
        """What the host calls us; empty while we are registered with none."""
        current = self._registration()
        return current.client if current is not None else ""

    def host_is_back(self) -> bool:
        """Whether some host serves the endpoint that we are not registered with. Costs a few system calls."""
        current = self.host
        found = find_host(self.endpoint)
        return found is not None and (current is None or found.host_id != current.host_id)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with every event, in the connection's thread. Returns how to stop it."""
        self._check_process()
        self._listeners.append(listener)

        def stop() -> None:
            with contextlib.suppress(ValueError):
                self._listeners.remove(listener)

        return stop

    # -- requests --------------------------------------------------------------------------------------------------

    def connect(self) -> HostInfo:
        """Register with the host if we are not yet. Raises HostUnavailable, HostLost or HostTimeout."""
        return self._registered().host

    def request(self, message: protocol.Message, timeout_s: float = REPLY_S) -> Reply:
        """Connect if need be, send, wait. Raises HostUnavailable, HostLost, HostTimeout or what the host answers."""
        return self._registered().connection.request(message, timeout_s)

    def attach(self, path: str, rules: tuple[DtypeRule, ...], wait_s: float) -> Lent:
        """One lease and the mapped segments it covers.

        Raises what the host answers, what :func:`lunashm.client.handover.redeem` raises, or SegmentGone. The lease
        ends when all the mappings are gone.
        """
        registration, reply = self._lease(path, rules, wait_s)
        try:
            return self._take(registration, reply)
        except (TicketRefused, HostLost) as exc:  # late with the ticket (a long suspend), or a new host: again, once
            if isinstance(exc, HostLost) and not self.host_is_back():
                raise
            log.info("attaching to %s again: %s", path, exc)
        registration, reply = self._lease(path, rules, wait_s)
        return self._take(registration, reply)

    def _lease(self, path: str, rules: tuple[DtypeRule, ...], wait_s: float) -> tuple[Registration, Attached]:
        registration = self._registered()
        try:
            reply = self._ask(registration, path, rules, wait_s)
        except (NotRegistered, HostLost) as exc:  # it dropped us (a long suspend, say), or was replaced: again, once
            if isinstance(exc, NotRegistered):
                registration.drop("does not know this process")
            elif not self.host_is_back():
                raise
            registration = self._registered()
            reply = self._ask(registration, path, rules, wait_s)
        return registration, reply

    def _take(self, registration: Registration, reply: Attached) -> Lent:
        """Map what a lease covers, and tie the lease to it; it is given back if that fails."""
        hold = Hold()
        weakref.finalize(hold, self._release, registration, reply.lease).atexit = False
        try:
            watch = self._watched(registration, reply.handles)  # before anything is mapped
            mappings = self._mappings.open(registration.host.host_id, reply.handles, reply.ticket)
        except BaseException:
            del hold  # now, not when the last traceback goes
            raise
        for mapping in mappings:
            mapping.when_gone(functools.partial(_let_go, hold))
        return Lent(reply, mappings, registration.epoch, watch)

    def _watched(self, registration: Registration, handles: tuple[Handle, ...]) -> HostWatch | None:
        """Raises HostLost, SegmentGone, or SharedMemoryError where a host that has to be watched cannot be."""
        if all(rung_of(handle).outlives_host for handle in handles):
            return None
        if registration.watch is None:
            registration.watch = HostWatch(self.endpoint, registration.host)
        registration.watch.check()
        return registration.watch

    def _ask(
        self, registration: Registration, path: str, rules: tuple[DtypeRule, ...], wait_s: float
    ) -> Attached:
        def too_late(reply: Reply) -> None:
            if isinstance(reply, Attached):
                self._release(registration, reply.lease)

        request = protocol.Attach(registration.client, path, rules, wait_s)
        reply = registration.connection.request(request, wait_s + REPLY_S, on_late=too_late)
        if not isinstance(reply, Attached):
            raise LunashmError(f"the host answered Attach with {type(reply).__name__}")
        return reply

    def _release(self, registration: Registration, lease: int) -> None:
        """The last view of a model died, or its attach was given up. Leaves a note for the connection's thread."""
        if os.getpid() != self._pid:
            return  # another process's lease
        connection, current = registration.connection, self._current
        if not connection.alive and current is not None and current.host.host_id == registration.host.host_id:
            connection = current.connection  # the wire broke, but it is still that host that holds our lease
        if registration.valid and connection.alive:
            with contextlib.suppress(LunashmError):
                connection.submit(protocol.Detach(registration.client, lease))

    # -- staying registered ----------------------------------------------------------------------------------------

    def _registration(self) -> Registration | None:
        self._check_process()
        current = self._current
        return current if current is not None and current.live else None

    def _registered(self) -> Registration:
        self._check_process()
        with self._connecting:
            current = self._registration()
            if current is None:
                current = self._current = self._register()
            return current

    def _register(self) -> Registration:
        """Over the wire we have, if it still works; else over a new one."""
        before = self._current
        if before is not None and before.connection.alive:
            connection = before.connection
        else:
            connection = Connection(
                self.endpoint, on_event=self._on_event, on_lost=self._on_lost, on_idle=self._on_idle
            )  # fmt: skip
        info = protocol.ClientInfo(self._pid, namespace(), start_ticks(), self._kind, self._label, __version__)
        try:
            reply = connection.request(protocol.Register(info))
            if not isinstance(reply, Registered):
                raise LunashmError(f"the host answered Register with {type(reply).__name__}")
            if reply.host.host_id != connection.host.host_id:
                raise HostUnavailable(f"the host at {self.endpoint.url} was replaced while we registered; attach again")
        except BaseException:
            connection.close()
            raise
        self._epoch += 1
        log.info("registered with host pid %d (%s, %s)", reply.host.pid, reply.host.device, reply.host.rung)
        renewal = time.monotonic() + reply.renew_every_s
        return Registration(connection, reply.client, reply.host, reply.renew_every_s, self._epoch, renewal)

    def _on_idle(self) -> None:
        current = self._current
        if current is None or not current.live or time.monotonic() < current.next_renewal:
            return
        current.next_renewal = time.monotonic() + current.renew_every_s

        def renewed(future: Future[Reply]) -> None:
            reply = None if future.exception() else future.result()
            if isinstance(reply, protocol.ErrorReply) and reply.code == NotRegistered.code:
                log.warning("the host dropped this client: %s", reply.message)
                current.drop("dropped this process")

        current.connection.submit(protocol.Renew(current.client)).add_done_callback(renewed)

    def _on_event(self, event: Event) -> None:
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception:
                log.exception("listener failed on %s", type(event).__name__)

    def _on_lost(self) -> None:
        """In the connection's thread. A host that was killed sends no farewell, so we tell the listeners."""
        current = self._current
        lost = current is not None and current.watch is not None
        stay = "the GPU memory it lent is gone with it" if lost else "mapped weights stay usable"
        log.warning("host of %s is gone; %s", self.endpoint.url, stay)
        if current is not None:
            self._on_event(protocol.HostStopping(current.host.host_id, "it is gone"))

    def close(self) -> None:
        """Leave the host. Views stay valid; the host takes our leases as ended. A later use connects again.

        Leases of memory that dies with the host end with our process: nobody knows who still reads it, and it must not
        be freed before.
        """
        if os.getpid() != self._pid:
            return
        current, self._current = self._current, None
        if current is not None:
            leave = current.valid and current.watch is None
            current.connection.close(protocol.Unregister(current.client) if leave else None)

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedProcess(
                f"this session belongs to pid {self._pid}; its forked child {os.getpid()} must attach itself, "
                "or be started with the spawn method"
            )


def _let_go(hold: Hold) -> None:
    """A mapping is gone, and with this call the reference it had to its lease."""


_sessions: dict[tuple[int, str], Session] = {}
_sessions_mutex = threading.Lock()


def session_for(endpoint: Endpoint, *, kind: str = "python", label: str = "") -> Session:
    """This process's one session with ``endpoint``. ``kind`` and ``label`` count for whoever comes first."""
    with _sessions_mutex:
        key = (os.getpid(), endpoint.url)
        if key not in _sessions:
            _sessions[key] = Session(endpoint, kind=kind, label=label)
        return _sessions[key]


def _reset_after_fork() -> None:
    """A fork may happen while another thread holds the lock; the child starts with a fresh one."""
    global _sessions_mutex
    _sessions_mutex = threading.Lock()


os.register_at_fork(after_in_child=_reset_after_fork)

__all__ = ["Session", "session_for"]
