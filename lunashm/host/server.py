"""The host's sockets, its event loop and its process: the only place on this side that knows ZeroMQ."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import zmq

from lunashm import protocol
from lunashm.errors import LunashmError, ProtocolError, SettingsError
from lunashm.host import processes
from lunashm.host.board import Board
from lunashm.host.handover import Handover
from lunashm.host.loading import Job, Outcome
from lunashm.host.service import Service
from lunashm.memory import Rung
from lunashm.paths import Endpoint, HostLock

log = logging.getLogger(__name__)

_IDLE_MS = 5_000
_BUSY_MS = 200
_LEAST_MS = 50
_LOADERS = 2
_BATCH = 256
"""Requests taken before the loop looks at anything else: a flood must not hide a client's death or a signal."""


Reader = Callable[[Board], contextlib.AbstractContextManager[object]]
"""Shows the board to others, in threads of its own, as long as it is entered."""


class Server:
    """One host. Everything but file loading happens in the thread that calls :meth:`run`, which is called once.

    ``reader`` is entered before clients can connect, and left when none can any more. It sees what this thread pins to
    the board, and nothing else.
    """

    def __init__(
        self,
        *,
        rung: Rung,
        endpoint: Endpoint,
        roots: tuple[str, ...],
        ttl_s: float,
        device_name: str = "",
        rung_reason: str = "",
        reader: Reader | None = None,
    ) -> None:
        self._rung = rung
        self._endpoint = endpoint
        self._reader = reader
        self._board: Board | None = None
        self._lock = HostLock(endpoint)
        self._finished: queue.SimpleQueue[tuple[Job, Outcome | BaseException]] = queue.SimpleQueue()
        self._wake_mutex = threading.Lock()
        self._wake_r = self._wake_w = -1
        self._loaders = ThreadPoolExecutor(_LOADERS, thread_name_prefix="lunashm-load")
        self._event_ids = itertools.count(1)
        self._pidfds: dict[int, str] = {}
        self._clients: dict[str, int] = {}
        self._stop_reason = ""
        self._idle_ms = max(_LEAST_MS, min(_IDLE_MS, int(ttl_s * 1000 / 3)))
        self.service = Service(
            rung=rung, roots=roots, endpoint=endpoint.url, ttl_s=ttl_s, outbox=self, submit=self._submit,
            device_name=device_name, rung_reason=rung_reason,
        )  # fmt: skip
        self._handover = Handover(endpoint, self.service.redeem, self.service.counters)

    def run(self, ready: Callable[[protocol.HostInfo], None]) -> None:
        """Serve until told to stop. ``ready`` is called once clients can connect.

        Raises AlreadyServing, SettingsError for an endpoint that cannot be bound, or what ``reader`` raises.
        """
        with contextlib.ExitStack() as stack:
            self._lock.acquire()
            stack.callback(self._lock.release)
            stack.enter_context(self._wake_pipe())
            stack.enter_context(self._signals())
            for name in self._rung.reclaim():
                log.warning("removed %s, left behind by a host that died", name)
            if self._reader is not None:  # before anybody can connect to a host that may not start
                self._board = Board(self.service.snapshot)
                stack.enter_context(self._reader(self._board))
            self._open_sockets(stack)
            stack.callback(self._close)
            self._lock.publish(self.service.info)
            ready(self.service.info)
            while not self._stop_reason:
                self._turn()

    def stop(self, reason: str = "asked to stop") -> None:
        """End :meth:`run` soon; from any thread, any number of times."""
        self._stop_reason = self._stop_reason or reason
        self._wake()

    def _open_sockets(self, stack: contextlib.ExitStack) -> None:
        self._context = stack.enter_context(zmq.Context())
        self._router = stack.enter_context(self._bind(zmq.ROUTER, self._endpoint.url))
        self._events = stack.enter_context(self._bind(zmq.PUB, self._endpoint.events))
        self._handover.open()
        stack.callback(self._handover.close)
        self._poller = zmq.Poller()
        self._poller.register(self._router, zmq.POLLIN)
        self._poller.register(self._wake_r, zmq.POLLIN)
        self._poller.register(self._handover.fileno(), zmq.POLLIN)

    def _bind(self, kind: int, url: str) -> zmq.Socket[bytes]:
        path = Path(url.removeprefix("ipc://"))
        socket: zmq.Socket[bytes] = self._context.socket(kind)
        try:
            socket.setsockopt(zmq.LINGER, 200)
            socket.setsockopt(zmq.MAXMSGSIZE, protocol.MAX_FRAME_BYTES)  # counts only if it is set before bind()
            if kind == zmq.ROUTER:
                socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # a reply that nobody can get is an error here
            path.unlink(missing_ok=True)  # we hold the lock: a socket file here is a dead host's
            socket.bind(url)
            path.chmod(0o600)
        except (zmq.ZMQError, OSError) as exc:
            socket.close()
            raise SettingsError(f"cannot listen on {url}: {exc.strerror}; choose another --endpoint") from exc
        return socket

    def _turn(self) -> None:
        """One round: wait for something, deal with all of it.

        Ended processes first: a request may close a pidfd and reuse its number for somebody who lives.
        """
        rest_ms = _BUSY_MS if self.service.busy else self._idle_ms
        if self._board is not None:
            rest_ms = min(rest_ms, self._board.rest_ms)
        ready = dict(self._poller.poll(min(rest_ms, self._handover.rest_ms)))
        for client in [self._pidfds[fd] for fd in ready if fd in self._pidfds]:
            self._guarded(self._forget, client)
        if self._wake_r in ready:
            self._woken()
        if self._router in ready:
            self._receive()
        self._guarded(self._handover.turn)
        self._guarded(self.service.tick)
        if self._board is not None:
            self._guarded(self._board.turn)
        if self.service.stopping:
            self._stop_reason = self._stop_reason or "asked to stop"

    def _guarded(self, step: Callable[..., None], *arguments: object) -> None:
        """The host outlives every surprise; the traceback is in its log."""
        try:
            step(*arguments)
        except Exception:
            log.exception("%s failed", getattr(step, "__name__", step))
            self.service.counters["error.internal"] += 1

    # -- requests --------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take the requests that are waiting. A bad one gets a typed error, or is counted and dropped."""
        for _ in range(_BATCH):
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
        except Exception as exc:
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

    def reply(self, route: bytes, message_id: int, message: protocol.Message) -> bool:
        delivered = True
        try:
            frames = protocol.pack(message, message_id)
        except ProtocolError as exc:
            log.error("no reply can hold this: %s", exc)
            self.service.counters[f"error.{exc.code}"] += 1
            frames, delivered = protocol.pack(protocol.ErrorReply(exc.code, exc.message), message_id), False
        try:
            self._router.send_multipart([route, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as exc:  # gone, or it does not read: it will time out and ask again
            log.info("reply to %s dropped: %s", route.hex(), exc)
            self.service.counters["dropped.replies"] += 1
            return False
        return delivered

    def publish(self, event: protocol.Message) -> None:
        try:
            self._events.send_multipart(protocol.pack(event, next(self._event_ids)), zmq.NOBLOCK)
        except (ProtocolError, zmq.ZMQError) as exc:
            log.error("event %s dropped: %s", type(event).__name__, exc)
            self.service.counters["dropped.events"] += 1

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
        with self._wake_mutex, contextlib.suppress(BlockingIOError):
            if self._wake_w >= 0:
                os.write(self._wake_w, b"\0")

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake_r, 4096)
        while not self._finished.empty():
            self._guarded(self.service.finish, *self._finished.get())

    @contextlib.contextmanager
    def _wake_pipe(self) -> Iterator[None]:
        self._wake_r, self._wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            yield
        finally:
            with self._wake_mutex:
                os.close(self._wake_r)
                os.close(self._wake_w)
                self._wake_r = self._wake_w = -1

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop on the usual signals. Python hears them in its main thread only; elsewhere :meth:`stop` is the way."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        wakeup_fd = signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup_fd)
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop_reason = f"signal {signal.Signals(number).name}"

    def _close(self) -> None:
        log.info("stopping: %s", self._stop_reason or "error")
        self._guarded(self.service.farewell, self._stop_reason or "error")
        self._lock.withdraw()  # before any memory goes: clients on a rung that dies with us ask this file
        self._guarded(self.service.close)
        self._loaders.shutdown(wait=True, cancel_futures=True)
        while not self._finished.empty():
            self._guarded(self.service.finish, *self._finished.get())
        for client in list(self._clients):
            self._unwatch(client)
        for path in (self._endpoint.socket_path, self._endpoint.events_path):
            path.unlink(missing_ok=True)
