"""One process's wire to one host: requests out, replies and events in. Knows bytes and futures, not models.

One thread owns the sockets (ZeroMQ sockets are not thread-safe) and a pidfd of the host, so a dead host fails every
pending request at once instead of by time-out. Any thread may call; nothing here survives fork.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

import zmq

from lunashm import protocol
from lunashm.errors import ForkedProcess, HostLost, HostTimeout, HostUnavailable, LunashmError, from_code
from lunashm.paths import Endpoint, find_host
from lunashm.process import namespace
from lunashm.protocol import Event, HostInfo, Message, Reply

log = logging.getLogger(__name__)

REPLY_S = 10.0
"""How long the host may take over a request that does not wait for a load."""

_POLL_MS = 1000


class Connection:
    """``on_event``, ``on_lost`` and ``on_idle`` are called in the connection's own thread and must not block.

    ``on_idle`` is called about once a second. Raises HostUnavailable if no host lives at ``endpoint``.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        on_event: Callable[[Event], None] | None = None,
        on_lost: Callable[[], None] | None = None,
        on_idle: Callable[[], None] | None = None,
    ) -> None:
        host = find_host(endpoint)
        if host is None:
            raise HostUnavailable(f"no lunashm host at {endpoint.url}; start one with: lunashm serve")
        self.host: HostInfo = host
        self._endpoint = endpoint
        self._on_event = on_event
        self._on_lost = on_lost
        self._on_idle = on_idle
        self._pid = os.getpid()
        self._ids = itertools.count(1)
        self._pending: dict[int, Future[Reply]] = {}
        self._outgoing: queue.SimpleQueue[tuple[int, Message]] = queue.SimpleQueue()
        self._mutex = threading.RLock()  # a finalizer may submit a Detach while this thread is in submit()
        self._dead: LunashmError | None = None
        self._closing = threading.Event()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._pidfd = _open_pidfd(host)
        if not self._host_lives():  # it died, and its pid may name another process by now
            self._release()
            raise HostUnavailable(f"the host at {endpoint.url} just stopped; start one with: lunashm serve")
        self._thread = threading.Thread(target=self._run, name="lunashm-connection", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._dead is None and not self._closing.is_set()

    def submit(self, message: Message) -> Future[Reply]:
        """Send and return at once. The future holds the reply, ErrorReply included, or raises HostLost."""
        self._check_process()
        future: Future[Reply] = Future()
        with self._mutex:
            if self._dead is not None or self._closing.is_set():
                future.set_exception(self._dead or HostLost("the connection to the host is closed; attach again"))
                return future
            number = next(self._ids)
            self._pending[number] = future
            self._outgoing.put((number, message))
        self._wake()
        return future

    def request(self, message: Message, timeout_s: float = REPLY_S) -> Reply:
        """Send and wait. Raises the error an ErrorReply names, HostLost, or HostTimeout."""
        future = self.submit(message)
        try:
            reply = future.result(timeout_s)
        except FutureTimeout as exc:
            raise HostTimeout(
                f"host pid {self.host.pid} did not answer {type(message).__name__} within {timeout_s:g} s; "
                "is it stopped or swapping? (lunashm status)"
            ) from exc
        if isinstance(reply, protocol.ErrorReply):
            raise from_code(reply.code, reply.message)
        return reply

    def close(self, last: Message | None = None, grace_s: float = 1.0) -> None:
        """Send ``last``, if any, then end the thread. Idempotent; does nothing in a forked child."""
        if os.getpid() != self._pid or self._closing.is_set():
            return
        if last is not None and self.alive:
            with contextlib.suppress(LunashmError, FutureTimeout):
                self.submit(last).result(grace_s)
        self._closing.set()
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(grace_s + _POLL_MS / 1000)

    # -- the connection's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        error: LunashmError = HostLost("the connection to the host was closed; attach again")
        try:
            with contextlib.ExitStack() as stack:
                self._open_sockets(stack)
                self._serve()
        except HostLost as exc:
            error = exc
        except Exception as exc:
            log.exception("connection to %s failed", self._endpoint.url)
            error = HostLost(f"the connection to {self._endpoint.url} failed: {exc!r}; attach again")
        with self._mutex:
            self._dead = error
            pending, self._pending = self._pending, {}
        for future in pending.values():
            future.set_exception(error)
        if self._on_lost is not None and not self._closing.is_set():
            self._on_lost()
        self._release()

    def _open_sockets(self, stack: contextlib.ExitStack) -> None:
        context = stack.enter_context(zmq.Context())
        self._dealer = stack.enter_context(context.socket(zmq.DEALER))
        self._dealer.setsockopt(zmq.LINGER, 200)
        self._dealer.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_FRAME_BYTES)
        self._dealer.connect(self._endpoint.url)
        self._poller = zmq.Poller()
        self._poller.register(self._dealer, zmq.POLLIN)
        self._poller.register(self._wake_r, zmq.POLLIN)
        if self._on_event is not None:
            self._subscriber = stack.enter_context(context.socket(zmq.SUB))
            self._subscriber.setsockopt(zmq.LINGER, 0)
            self._subscriber.setsockopt(zmq.SUBSCRIBE, b"")
            self._subscriber.connect(self._endpoint.events)
            self._poller.register(self._subscriber, zmq.POLLIN)
        if self._pidfd is not None:
            self._poller.register(self._pidfd, zmq.POLLIN)

    def _serve(self) -> None:
        next_idle = time.monotonic()
        while not self._closing.is_set():
            ready = dict(self._poller.poll(_POLL_MS))
            if self._wake_r in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_r, 4096)
            while not self._outgoing.empty():
                number, message = self._outgoing.get()
                self._dealer.send_multipart(protocol.pack(message, number))
            if self._dealer in ready:
                self._take_replies()
            if self._on_event is not None and self._subscriber in ready:
                self._take_events()
            if (self._pidfd is not None and self._pidfd in ready) or (self._pidfd is None and not self._host_lives()):
                raise HostLost(f"the host (pid {self.host.pid}) is gone; start it again with: lunashm serve")
            if self._on_idle is not None and time.monotonic() >= next_idle:
                next_idle = time.monotonic() + _POLL_MS / 1000
                self._on_idle()

    def _host_lives(self) -> bool:
        """For a host in another PID namespace: its lock says so."""
        now = find_host(self._endpoint)
        return now is not None and now.host_id == self.host.host_id

    def _take_replies(self) -> None:
        while True:
            try:
                frames = self._dealer.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                header, body = frames
                number, reply = protocol.read_header(header), protocol.read_reply(body)
            except (ValueError, LunashmError) as exc:
                number = protocol.peek_id(frames[0])
                reply = protocol.ErrorReply(getattr(exc, "code", "malformed_message"), f"bad reply from the host: {exc}")
            with self._mutex:
                future = self._pending.pop(number, None)
            if future is not None and future.set_running_or_notify_cancel():
                future.set_result(reply)

    def _take_events(self) -> None:
        while True:
            try:
                frames = self._subscriber.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                protocol.read_header(frames[0])
                event = protocol.read_event(frames[1])
            except (IndexError, LunashmError) as exc:
                log.warning("event dropped: %s", exc)
                continue
            if self._on_event is not None:
                self._on_event(event)

    # -- small parts -----------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        with self._mutex, contextlib.suppress(BlockingIOError):
            if self._wake_w >= 0:
                os.write(self._wake_w, b"\0")

    def _release(self) -> None:
        """Give the descriptors back; runs last, in the connection's thread."""
        with self._mutex:
            for fd in (self._wake_r, self._wake_w, *([self._pidfd] if self._pidfd is not None else [])):
                os.close(fd)
            self._wake_r = self._wake_w = -1

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedProcess(
                f"this connection belongs to pid {self._pid}, not to its forked child {os.getpid()}; "
                "attach in the child, or start it with the spawn method"
            )


def _open_pidfd(host: HostInfo) -> int | None:
    """A pidfd of the host, opened while its lock is known to be held; None where we cannot see its process."""
    if host.pid_namespace != namespace():
        return None
    try:
        return os.pidfd_open(host.pid)
    except (OSError, AttributeError):
        return None
