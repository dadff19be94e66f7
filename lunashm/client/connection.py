"""One process's wire to one host: requests out, replies and events in. Knows bytes and futures, not models.

One thread owns the sockets (ZeroMQ sockets are not thread-safe) and a pidfd of the host, so a dead host fails every
pending request at once instead of by time-out. Any thread may call, a finalizer in the middle of anything included;
nothing here survives fork.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Any

import zmq

from lunashm import protocol
from lunashm.errors import (
    ForkedProcess,
    HostLost,
    HostTimeout,
    HostUnavailable,
    LunashmError,
    MalformedMessage,
    from_code,
)
from lunashm.paths import Endpoint, find_host, nobody_at
from lunashm.process import pidfd_of
from lunashm.protocol import Event, HostInfo, HostStopping, Message, Reply

log = logging.getLogger(__name__)

REPLY_S = 10.0
"""How long the host may take over a request that does not wait for a load."""

_POLL_MS = 1000
_LAST_WORDS_MS = 50
"""How long replies of a host that is gone may still take."""

_ENDING_MS = 50
"""How often to look whether a host that said good-bye is gone."""


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
            raise nobody_at(endpoint)
        self.host: HostInfo = host
        self._endpoint = endpoint
        self._on_event = on_event
        self._on_lost = on_lost
        self._on_idle = on_idle
        self._pid = os.getpid()
        self._ids = itertools.count(1)
        self._pending: dict[int, Future[Reply]] = {}
        self._outgoing: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self._unsent: deque[list[bytes]] = deque()
        self._mutex = threading.RLock()  # a finalizer may submit a Detach while this thread is in submit()
        self._dead: LunashmError | None = None
        self._stopping = False
        self._closing = threading.Event()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._pidfd = pidfd_of(host.pid, host.pid_namespace)
        if not self._host_lives():  # it died, and its pid may name another process by now
            self._release()
            raise HostUnavailable(f"the host at {endpoint.url} just stopped; start one with: lunashm serve")
        self._thread = threading.Thread(target=self._run, name="lunashm-connection", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as exc:  # out of threads
            self._release()
            raise HostUnavailable(f"cannot talk to the host at {endpoint.url}: {exc}") from exc

    @property
    def alive(self) -> bool:
        return self._dead is None and not self._closing.is_set()

    def submit(self, message: Message) -> Future[Reply]:
        """Send and return at once. The future holds the reply, ErrorReply included, or raises HostLost.

        Raises MessageTooLarge or MalformedMessage for what the host would refuse unread.
        """
        self._check_process()
        future: Future[Reply] = Future()
        frames = protocol.pack_request(message, number := next(self._ids))
        with self._mutex:
            if self._dead is not None or self._closing.is_set():
                error = self._dead or HostLost("the connection to the host is closed; attach again")
                future.set_exception(type(error)(error.message))
                return future
            self._pending[number] = future
            self._outgoing.put(frames)
        self._wake()
        return future

    def request(
        self, message: Message, timeout_s: float = REPLY_S, on_late: Callable[[Reply], None] | None = None
    ) -> Reply:
        """Send and wait. Raises the error an ErrorReply names, HostLost, or HostTimeout.

        ``on_late`` is given, in the connection's thread, a reply that comes when nobody waits for it any more.
        """
        future = self.submit(message)
        try:
            reply = future.result(min(timeout_s, threading.TIMEOUT_MAX))
        except BaseException as exc:  # an interrupt included: the request is under way, and its answer will come
            if on_late is not None:
                future.add_done_callback(lambda late: None if late.exception() else on_late(late.result()))
            if isinstance(exc, FutureTimeout):
                raise HostTimeout(
                    f"host pid {self.host.pid} did not answer {type(message).__name__} within {timeout_s:g} s; "
                    "is it stopped or swapping? (lunashm status)"
                ) from exc
            raise
        if isinstance(reply, protocol.ErrorReply):
            raise from_code(reply.code, reply.message)
        return reply

    def close(self, last: Message | None = None, grace_s: float = 1.0) -> None:
        """Send ``last``, if any, then end the thread. Idempotent; does nothing in a forked child."""
        if os.getpid() != self._pid or self._closing.is_set():
            return
        elsewhere = threading.current_thread() is not self._thread
        if last is not None and self.alive:
            with contextlib.suppress(LunashmError, FutureTimeout):
                future = self.submit(last)
                if elsewhere:
                    future.result(grace_s)
        self._closing.set()
        self._wake()
        if elsewhere:
            self._thread.join(grace_s + _POLL_MS / 1000)

    # -- the connection's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        error: LunashmError = HostLost("the connection to the host was closed; attach again")
        try:
            with contextlib.ExitStack() as stack:
                self._open_sockets(stack)
                self._serve()
                self._send()
        except HostLost as exc:
            error = exc
        except Exception as exc:
            log.exception("connection to %s failed", self._endpoint.url)
            error = HostLost(f"the connection to {self._endpoint.url} failed: {exc!r}; attach again")
        with self._mutex:
            self._dead = error
            pending, self._pending = self._pending, {}
        for future in pending.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(type(error)(error.message))  # one each: every thread adds its own traceback
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
            self._subscriber.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_FRAME_BYTES)
            self._subscriber.setsockopt(zmq.SUBSCRIBE, b"")
            self._subscriber.connect(self._endpoint.events)
            self._poller.register(self._subscriber, zmq.POLLIN)
        if self._pidfd is not None:
            self._poller.register(self._pidfd, zmq.POLLIN)

    def _serve(self) -> None:
        next_idle = time.monotonic()
        while not self._closing.is_set():
            ready = dict(self._poller.poll(_ENDING_MS if self._stopping else _POLL_MS))
            if self._wake_r in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_r, 4096)
            self._send()
            if self._dealer in ready:
                self._take_replies()
            if self._on_event is not None and self._subscriber in ready:
                self._take_events()
            idle = time.monotonic() >= next_idle
            if self._host_is_gone(ready, idle):
                if self._pending and self._dealer.poll(_LAST_WORDS_MS):
                    self._take_replies()
                raise HostLost(f"the host (pid {self.host.pid}) is gone; start it again with: lunashm serve")
            if idle:
                next_idle = time.monotonic() + _POLL_MS / 1000
                if self._on_idle is not None:
                    self._on_idle()

    def _send(self) -> None:
        """Pass on what :meth:`submit` left. A host that does not read must not block us: we watch its life, too."""
        while True:
            with contextlib.suppress(queue.Empty):
                while True:
                    self._unsent.append(self._outgoing.get_nowait())
            if not self._unsent:
                return
            try:
                self._dealer.send_multipart(self._unsent[0], zmq.NOBLOCK)
            except zmq.Again:
                return  # its queue is full: again at the next poll
            self._unsent.popleft()

    def _host_is_gone(self, ready: dict[Any, int], idle: bool) -> bool:
        """The pidfd says so at once. The lock is asked where there is none, or a host may end before its process."""
        if self._pidfd is not None and self._pidfd in ready:
            return True
        unsure = self._stopping or (idle and (self._pidfd is None or bool(self._pending)))
        return unsure and not self._host_lives()

    def _host_lives(self) -> bool:
        """By its lock, which says so across PID namespaces, too."""
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
                code = exc.code if isinstance(exc, LunashmError) else MalformedMessage.code
                reply = protocol.ErrorReply(code, f"bad reply from the host: {exc}")
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
                header, body = frames
                protocol.read_header(header)
                event = protocol.read_event(body)
            except (ValueError, LunashmError) as exc:
                log.warning("event dropped: %s", exc)
                continue
            if isinstance(event, HostStopping) and event.host_id == self.host.host_id:
                self._stopping = True  # its last replies may still be on their way: leave when its lock is gone
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
