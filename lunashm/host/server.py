"""The host's sockets, its event loop and its process: the only place on this side that knows ZeroMQ."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import zmq

from lunashm import protocol
from lunashm.errors import LunashmError
from lunashm.host import processes
from lunashm.host.loading import Job, Outcome
from lunashm.host.service import Service
from lunashm.memory import Rung
from lunashm.paths import Endpoint, HostLock

log = logging.getLogger(__name__)

_IDLE_MS = 5_000
_BUSY_MS = 200
_LOADERS = 2


class Server:
    """One host process. Everything but file loading happens in the thread that calls :meth:`run`."""

    def __init__(self, *, rung: Rung, endpoint: Endpoint, roots: tuple[str, ...], ttl_s: float) -> None:
        self._rung = rung
        self._endpoint = endpoint
        self._lock = HostLock(endpoint)
        self._finished: queue.SimpleQueue[tuple[Job, Outcome | BaseException]] = queue.SimpleQueue()
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix="lunashm-load")
        self._event_ids = itertools.count(1)
        self._pidfds: dict[int, str] = {}
        self._clients: dict[str, int] = {}
        self._stop_reason = ""
        self._idle_ms = min(_IDLE_MS, int(ttl_s * 1000 / 3))
        self.service = Service(
            rung=rung, roots=roots, endpoint=endpoint.url, ttl_s=ttl_s, outbox=self, submit=self._submit
        )  # fmt: skip

    def run(self, ready: Callable[[protocol.HostInfo], None]) -> None:
        """Serve until told to stop. ``ready`` is called once clients can connect. Raises AlreadyServing."""
        with contextlib.ExitStack() as stack:
            self._lock.acquire()
            stack.callback(self._lock.release)
            for name in self._rung.reclaim():
                log.warning("removed %s, left behind by a host that died", name)
            self._context = stack.enter_context(zmq.Context())
            self._router = stack.enter_context(self._bind(zmq.ROUTER, self._endpoint.url))
            self._router.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_FRAME_BYTES)
            self._events = stack.enter_context(self._bind(zmq.PUB, self._endpoint.events))
            self._poller = zmq.Poller()
            self._poller.register(self._router, zmq.POLLIN)
            self._poller.register(self._wake_r, zmq.POLLIN)
            stack.callback(self._close)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, self._on_signal)
            signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
            self._lock.publish(self.service.info)
            ready(self.service.info)
            while not self._stop_reason:
                self._turn()

    def _bind(self, kind: int, url: str) -> zmq.Socket[bytes]:
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 200)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(url.removeprefix("ipc://"))  # we hold the lock: a socket file here is a dead host's
        socket.bind(url)
        return socket

    def _turn(self) -> None:
        """One round: wait for something, deal with all of it."""
        for source, _ in self._poller.poll(_BUSY_MS if self.service.busy else self._idle_ms):
            if source is self._router:
                self._receive()
            elif source == self._wake_r:
                self._woken()
            elif source in self._pidfds:
                self._forget(self._pidfds[source])
        self.service.tick()
        if self.service.stopping:
            self._stop_reason = self._stop_reason or "asked to stop"

    # -- requests --------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take every request that is waiting. A bad one gets a typed error, or is counted and dropped."""
        while True:
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 3:
                self.service.counters["dropped.frames"] += 1
                continue
            route, header, body = frames
            try:
                message_id = protocol.read_header(header)
                request = protocol.read_request(body)
            except LunashmError as exc:
                self.service.counters[f"error.{exc.code}"] += 1
                self.reply(route, protocol.peek_id(header), protocol.ErrorReply(exc.code, exc.message))
                continue
            self._dispatch(route, message_id, request)

    def _dispatch(self, route: bytes, message_id: int, request: protocol.Request) -> None:
        try:
            if isinstance(request, protocol.Register):
                self._register(route, message_id, request)
            else:
                self.service.handle(route, message_id, request)
                if isinstance(request, protocol.Unregister):
                    self._unwatch(request.client)
        except Exception as exc:  # the host outlives every request; the traceback is in its log
            log.exception("%s failed", type(request).__name__)
            self.service.counters["error.internal"] += 1
            self.reply(route, message_id, protocol.ErrorReply("internal", f"the host failed on this request: {exc!r}"))

    def _register(self, route: bytes, message_id: int, request: protocol.Register) -> None:
        pidfd = processes.watch(request.info)
        client, reply = self.service.register(request.info, watched=pidfd is not None)
        if pidfd is not None:
            self._pidfds[pidfd] = client.id
            self._clients[client.id] = pidfd
            self._poller.register(pidfd, zmq.POLLIN)
        self.reply(route, message_id, reply)

    def _unwatch(self, client: str) -> None:
        pidfd = self._clients.pop(client, None)
        if pidfd is not None:
            del self._pidfds[pidfd]
            self._poller.unregister(pidfd)
            os.close(pidfd)

    def _forget(self, client: str) -> None:
        self._unwatch(client)
        self.service.drop_client(client, "process ended")

    # -- Outbox ----------------------------------------------------------------------------------------------------

    def reply(self, route: bytes, message_id: int, message: protocol.Message) -> None:
        try:
            self._router.send_multipart([route, *protocol.pack(message, message_id)], zmq.NOBLOCK)
        except zmq.ZMQError as exc:  # a peer that does not read; it will time out and retry
            log.warning("reply to %s dropped: %s", route.hex(), exc)
            self.service.counters["dropped.replies"] += 1

    def publish(self, event: protocol.Message) -> None:
        self._events.send_multipart(protocol.pack(event, next(self._event_ids)))

    # -- loading and signals ---------------------------------------------------------------------------------------

    def _submit(self, job: Job) -> None:
        def work() -> None:
            try:
                result: Outcome | BaseException = job.run(self._rung)
            except BaseException as exc:  # noqa: BLE001 - handed to finish(), which tells everyone who waits
                result = exc
            self._finished.put((job, result))
            self._wake()

        self._loaders.submit(work)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_w, b"\0")

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 4096)
        while not self._finished.empty():
            self.service.finish(*self._finished.get())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_reason = f"signal {signal.Signals(number).name}"

    def _close(self) -> None:
        log.info("stopping: %s", self._stop_reason or "error")
        self.service.close(self._stop_reason or "error")
        self._loaders.shutdown(wait=True, cancel_futures=True)
        while not self._finished.empty():
            self.service.finish(*self._finished.get())
        for client in list(self._clients):
            self._unwatch(client)
        signal.set_wakeup_fd(-1)
        with contextlib.suppress(FileNotFoundError):
            self._endpoint.socket_path.unlink()
