"""One process as a client of one host: registered once, kept alive, found again when a new host comes up.

Leases follow memory: a lease is released when the last view of its mapping in this process is gone, so no caller can
hold tensors of a model that the host believes free (I2).
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future

from lunashm import __version__, protocol
from lunashm.client.connection import REPLY_S, Connection
from lunashm.errors import ForkedProcess, HostUnavailable, LunashmError, NotRegistered
from lunashm.manifest import DtypeRule
from lunashm.memory import Mapping, open_handle
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
        self.epoch = 0
        self._kind = kind
        self._label = label
        self._pid = os.getpid()
        self._mutex = threading.RLock()
        self._connection: Connection | None = None
        self._registered: Registered | None = None
        self._next_renewal = 0.0
        self._mappings: weakref.WeakValueDictionary[tuple[str, bytes], Mapping] = weakref.WeakValueDictionary()
        self._leases: dict[int, set[int]] = {}
        self._listeners: list[Listener] = []
        atexit.register(self.close)

    @property
    def host(self) -> HostInfo | None:
        """The host we are registered with, or None."""
        with self._mutex:
            connected = self._connection is not None and self._connection.alive
            return self._registered.host if connected and self._registered else None

    @property
    def client_id(self) -> str:
        with self._mutex:
            return self._registered.client if self._registered else ""

    def host_is_back(self) -> bool:
        """Whether some host serves the endpoint that we are not registered with. Costs two system calls."""
        with self._mutex:
            current = self.host
            found = find_host(self.endpoint)
            return found is not None and (current is None or found.host_id != current.host_id)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call ``listener`` with every event, in the connection's thread. Returns how to stop it."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    # -- requests --------------------------------------------------------------------------------------------------

    def request(self, message: protocol.Message, timeout_s: float = REPLY_S) -> Reply:
        """Connect if need be, send, wait. Raises HostUnavailable, HostLost, HostTimeout or what the host answers."""
        connection, _ = self._connected()
        return connection.request(message, timeout_s)

    def attach(
        self, path: str, rules: tuple[DtypeRule, ...], wait_s: float
    ) -> tuple[Attached, tuple[Mapping, ...], int]:
        """One lease and its mappings, and the epoch it belongs to. Raises what the host answers, or SegmentGone."""
        for attempt in (1, 2):
            connection, registered = self._connected()
            try:
                request = protocol.Attach(registered.client, path, rules, wait_s)
                reply = connection.request(request, wait_s + REPLY_S)
                break
            except NotRegistered:
                self._forget(connection)  # the host dropped us (a long suspend, say): register anew, once
                if attempt == 2:
                    raise
        if not isinstance(reply, Attached):
            raise LunashmError(f"the host answered Attach with {type(reply).__name__}")
        try:
            mappings = tuple(self._map(handle, registered) for handle in reply.handles)
        except BaseException:
            self._release_later(registered.client, {reply.lease})
            raise
        self._tie(reply.lease, mappings, registered)
        return reply, mappings, self.epoch

    def _map(self, handle: Handle, registered: Registered) -> Mapping:
        key = (handle.rung, handle.data)
        with self._mutex:
            mapping = self._mappings.get(key)
            if mapping is None:
                mapping = self._mappings[key] = open_handle(handle)
                self._leases[id(mapping.buffer)] = set()
                weakref.finalize(mapping.buffer, self._unmapped, id(mapping.buffer), registered.client).atexit = False
            return mapping

    def _tie(self, lease: int, mappings: tuple[Mapping, ...], registered: Registered) -> None:
        """The lease lives as long as the first segment's mapping: a model's segments are always mapped together."""
        with self._mutex:
            self._leases[id(mappings[0].buffer)].add(lease)

    def _unmapped(self, key: int, client: str) -> None:
        """The last view of a segment died; runs in whatever thread dropped it, so it only leaves a note."""
        leases = self._leases.pop(key, set())
        self._release_later(client, leases)

    def _release_later(self, client: str, leases: set[int]) -> None:
        connection = self._connection
        if os.getpid() != self._pid or connection is None or client != self.client_id:
            return  # another process's lease, or one that ended with its host
        for lease in leases:
            with contextlib.suppress(LunashmError):
                connection.submit(protocol.Detach(client, lease))

    # -- staying registered ----------------------------------------------------------------------------------------

    def _connected(self) -> tuple[Connection, Registered]:
        if os.getpid() != self._pid:
            raise ForkedProcess(
                f"this session belongs to pid {self._pid}; its forked child {os.getpid()} must attach itself, "
                "or be started with the spawn method"
            )
        with self._mutex:
            if self._connection is not None and self._connection.alive and self._registered is not None:
                return self._connection, self._registered
            connection = Connection(
                self.endpoint, on_event=self._on_event, on_lost=self._on_lost, on_idle=self._on_idle
            )  # fmt: skip
            try:
                reply = connection.request(protocol.Register(self._info()))
            except BaseException:
                connection.close()
                raise
            if not isinstance(reply, Registered):
                connection.close()
                raise LunashmError(f"the host answered Register with {type(reply).__name__}")
            self._connection, self._registered = connection, reply
            self._next_renewal = time.monotonic() + reply.renew_every_s
            self.epoch += 1
            log.info("registered with host pid %d (%s, %s)", reply.host.pid, reply.host.device, reply.host.rung)
            return connection, reply

    def _info(self) -> protocol.ClientInfo:
        return protocol.ClientInfo(self._pid, namespace(), start_ticks(), self._kind, self._label, __version__)

    def _forget(self, connection: Connection) -> None:
        with self._mutex:
            if self._connection is connection:
                self._connection = self._registered = None
        connection.close()

    def _on_idle(self) -> None:
        connection, registered = self._connection, self._registered
        if connection is None or registered is None or time.monotonic() < self._next_renewal:
            return
        self._next_renewal = time.monotonic() + registered.renew_every_s
        connection.submit(protocol.Renew(registered.client)).add_done_callback(self._renewed)

    def _renewed(self, future: Future[Reply]) -> None:
        reply = None if future.exception() else future.result()
        if isinstance(reply, protocol.ErrorReply) and reply.code == NotRegistered.code:
            log.warning("the host dropped this client: %s", reply.message)
            with self._mutex:
                self._registered = None

    def _on_event(self, event: Event) -> None:
        for listener in list(self._listeners):
            try:
                listener(event)
            except Exception:
                log.exception("listener failed on %s", type(event).__name__)

    def _on_lost(self) -> None:
        log.warning("host of %s is gone; mapped weights stay usable", self.endpoint.url)
        with self._mutex:
            self._connection = self._registered = None

    def close(self) -> None:
        """Leave the host. Views stay valid; the host takes their leases as ended."""
        if os.getpid() != self._pid:
            return
        with self._mutex:
            connection, registered = self._connection, self._registered
            self._connection = self._registered = None
        if connection is not None:
            connection.close(protocol.Unregister(registered.client) if registered else None)


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

__all__ = ["HostUnavailable", "Session", "session_for"]
