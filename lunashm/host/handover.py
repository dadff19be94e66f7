"""The socket that hands descriptors to clients, against tickets. Knows datagrams and deadlines, not leases or memory.

A peer connects, sends one Redeem, gets HandedOver with descriptors (SCM_RIGHTS) or an ErrorReply, and is done. Nothing
here waits: whoever does not speak within :data:`PATIENCE_S`, or does not read, is dropped.
"""

from __future__ import annotations

import array
import contextlib
import errno
import logging
import math
import os
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lunashm import protocol as p
from lunashm.errors import LunashmError, MessageTooLarge, SettingsError, SharedMemoryError, TicketRefused
from lunashm.paths import Endpoint

log = logging.getLogger(__name__)

PATIENCE_S = 2.0
"""How long a peer may take to say what it wants."""

MOST_OPEN = 64
"""Peers at one time; more wait in the kernel's queue."""

_PAUSE_S = 1.0
"""How long not to listen when there is no descriptor to accept anybody with."""

_FOREVER = 1e9

_CREDENTIALS = struct.Struct("iII")
"""struct ucred: pid, uid, gid."""


@dataclass(eq=False)
class _Peer:
    socket: socket.socket
    pid: int
    deadline: float


class Handover:
    """``redeem`` is given a ticket and the pid that presents it; it returns descriptors, which stay its own.

    One thread. Whoever owns the loop calls :meth:`turn` when :meth:`fileno` is readable, or :attr:`rest_ms` are over.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        redeem: Callable[[bytes, int], Sequence[int]],
        counters: Counter[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = endpoint.fds_path
        self._redeem = redeem
        self._counters = counters
        self._clock = clock
        self._peers: dict[int, _Peer] = {}
        self._listening = False
        self._resume_at = 0.0
        self._exhausted = False

    def open(self) -> None:
        """Raises SettingsError."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._epoll = select.epoll()
        try:
            self._path.unlink(missing_ok=True)  # the caller holds the host's lock: a socket file here is a dead host's
            self._listener.bind(str(self._path))
            self._path.chmod(0o600)
            self._listener.listen(socket.SOMAXCONN)
        except OSError as exc:
            self._listener.close()
            self._epoll.close()
            raise SettingsError(f"cannot listen on {self._path}: {exc.strerror}; choose another --endpoint") from exc
        self._listen(True)

    def close(self) -> None:
        for peer in list(self._peers.values()):
            self._part(peer)
        self._listener.close()
        self._epoll.close()
        self._path.unlink(missing_ok=True)

    def fileno(self) -> int:
        """Readable when there is something to do."""
        return self._epoll.fileno()

    @property
    def rest_ms(self) -> int:
        """Milliseconds until there is something to do although nothing is readable."""
        times = [peer.deadline for peer in self._peers.values()]
        if self._resume_at:
            times.append(self._resume_at)
        return max(0, math.ceil((min(times, default=_FOREVER) - self._clock()) * 1000))

    def turn(self) -> None:
        """Take who comes, answer who speaks, drop who is late."""
        for fd, _ in self._epoll.poll(0):
            if fd == self._listener.fileno():
                self._accept()
            elif fd in self._peers:
                self._hear(self._peers[fd])
        now = self._clock()
        for peer in [peer for peer in self._peers.values() if peer.deadline <= now]:
            self._drop(peer, f"said nothing for {PATIENCE_S:g} s")
        if now >= self._resume_at:
            self._resume_at = 0.0
            self._listen(len(self._peers) < MOST_OPEN or self._listening)

    # -- who comes -------------------------------------------------------------------------------------------------

    def _listen(self, on: bool) -> None:
        """What nobody listens to stays in the kernel's queue."""
        if on and not self._listening:
            self._epoll.register(self._listener, select.EPOLLIN)
        elif self._listening and not on:
            self._epoll.unregister(self._listener)
        self._listening = on

    def _accept(self) -> None:
        for _ in range(MOST_OPEN):
            if len(self._peers) >= MOST_OPEN and not self._make_room():
                self._listen(False)
                return
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as exc:  # no descriptor, or no memory, to accept with: it stays in the queue, and readable
                self._pause(exc)
                return
            self._exhausted = False
            connection.setblocking(False)
            pid, uid, _ = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            peer = self._peers[connection.fileno()] = _Peer(connection, pid, self._clock() + PATIENCE_S)
            self._epoll.register(connection, select.EPOLLIN)
            if uid != os.geteuid():
                self._refuse(peer, 0, _foreign(uid))
                self._part(peer)

    def _make_room(self) -> bool:
        """Who holds several places loses the oldest, so that no process can keep the others out."""
        pid, places = Counter(peer.pid for peer in self._peers.values()).most_common(1)[0]
        if places > 1:
            self._drop(next(peer for peer in self._peers.values() if peer.pid == pid), "asked too often at once")
        return places > 1

    def _pause(self, exc: OSError) -> None:
        if not self._exhausted:
            log.error("no clients can fetch descriptors: %s; raise the host's limit of open files (ulimit -n)", exc)
        self._exhausted = True
        self._counters["dropped.accepts"] += 1
        self._listen(False)
        self._resume_at = self._clock() + _PAUSE_S

    # -- what they say ---------------------------------------------------------------------------------------------

    def _hear(self, peer: _Peer) -> None:
        try:
            data = peer.socket.recv(p.MAX_DATAGRAM_BYTES + 1)  # descriptors that come with it are dropped by the kernel
        except BlockingIOError:
            return
        except OSError as exc:
            self._drop(peer, str(exc))
            return
        if not data:
            self._drop(peer, "left")
            return
        header, body = p.split_datagram(data)
        try:
            number, descriptors = self._wanted(peer, header, body)
            self._hand_over(peer, number, descriptors)
        except LunashmError as exc:
            self._refuse(peer, p.peek_id(header), exc)
        finally:
            self._part(peer)

    def _wanted(self, peer: _Peer, header: bytes, body: bytes) -> tuple[int, Sequence[int]]:
        """The message id, and what the ticket in it is good for. Raises what the peer is to be told."""
        if len(header) + len(body) > p.MAX_DATAGRAM_BYTES:
            raise MessageTooLarge(f"a message here has at most {p.MAX_DATAGRAM_BYTES} bytes")
        number = p.read_header(header)
        request = p.read_redeem(body)
        return number, self._redeem(request.ticket, peer.pid)

    def _hand_over(self, peer: _Peer, number: int, descriptors: Sequence[int]) -> None:
        """Raises SharedMemoryError."""
        for first in range(0, len(descriptors), p.DESCRIPTORS_PER_DATAGRAM):
            batch = array.array("i", descriptors[first : first + p.DESCRIPTORS_PER_DATAGRAM])
            data = p.pack_datagram(p.HandedOver(first, len(descriptors)), number)
            try:
                peer.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, batch)])
            except OSError as exc:
                if exc.errno == errno.ETOOMANYREFS:
                    raise SharedMemoryError(
                        "too many descriptors are on their way between this user's processes; attach again in a "
                        "moment, or raise the host's limit of open files (ulimit -n)"
                    ) from exc
                self._note(peer, f"does not take its descriptors: {exc}")
                return

    def _refuse(self, peer: _Peer, number: int, error: LunashmError) -> None:
        log.warning("no descriptors for pid %d: %s", peer.pid, error)
        self._counters[f"error.{error.code}"] += 1
        with contextlib.suppress(OSError):  # it has left, or does not read
            peer.socket.send(p.pack_datagram(p.ErrorReply(error.code, error.message), number))

    # -- who goes --------------------------------------------------------------------------------------------------

    def _drop(self, peer: _Peer, why: str) -> None:
        self._note(peer, why)
        self._part(peer)

    def _note(self, peer: _Peer, why: str) -> None:
        log.info("pid %d dropped without descriptors: %s", peer.pid, why)
        self._counters["dropped.handovers"] += 1

    def _part(self, peer: _Peer) -> None:
        del self._peers[peer.socket.fileno()]
        self._epoll.unregister(peer.socket)
        peer.socket.close()


def _foreign(uid: int) -> TicketRefused:
    return TicketRefused(
        f"this host serves uid {os.geteuid()}, not uid {uid}; run both as one user, or start a host of your own"
    )
