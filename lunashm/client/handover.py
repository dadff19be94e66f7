"""Fetching descriptors from a host, against a ticket. Knows one Unix socket, neither sessions nor memory."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import resource
import socket
import time
from collections.abc import Iterator

from lunashm import protocol
from lunashm.errors import (
    HostLost,
    HostTimeout,
    HostUnavailable,
    LunashmError,
    MalformedMessage,
    SharedMemoryError,
    TicketRefused,
    from_code,
)
from lunashm.paths import Endpoint, find_host
from lunashm.protocol import ErrorReply, HandedOver, Redeem

HANDOVER_S = 10.0
"""How long the host may take over it."""

_RETRY_S = 0.005
_ROOM = socket.CMSG_SPACE(protocol.DESCRIPTORS_PER_DATAGRAM * array.array("i").itemsize)
_OUT_OF_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
_MESSAGE_ID = 1


def redeem(endpoint: Endpoint, ticket: bytes, timeout_s: float = HANDOVER_S) -> list[int]:
    """The descriptors that ``ticket`` is good for, in the order of their handles. They are the caller's to close, and
    no program that this process starts inherits them.

    Raises TicketRefused, HostLost, HostUnavailable, HostTimeout, MalformedMessage, ProtocolMismatch, SharedMemoryError
    where this process may open no more files; all without a descriptor left open.
    """
    deadline = time.monotonic() + timeout_s
    descriptors: list[int] = []
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as wire:
            _connect(wire, endpoint, deadline)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused unheard: it says why
                wire.send(protocol.pack_datagram(Redeem(ticket), _MESSAGE_ID))
            total = 1
            while len(descriptors) < total:
                wire.settimeout(max(deadline - time.monotonic(), 1e-3))
                total = _take(wire, endpoint, descriptors)
    except BaseException as exc:
        close_all(descriptors)
        if isinstance(exc, OSError):
            raise _ours(exc, endpoint, timeout_s) from exc
        raise
    return descriptors


@contextlib.contextmanager
def borrowed(endpoint: Endpoint, ticket: bytes, count: int) -> Iterator[list[int] | list[None]]:
    """``count`` descriptors, closed at the end of the block; as many None for an empty ticket. Raises as redeem()."""
    if not ticket:
        yield [None] * count
        return
    descriptors = redeem(endpoint, ticket)
    try:
        if len(descriptors) != count:
            raise MalformedMessage(f"the host handed over {len(descriptors)} descriptors for {count} segments")
        yield list(descriptors)
    finally:
        close_all(descriptors)


def close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


def _connect(wire: socket.socket, endpoint: Endpoint, deadline: float) -> None:
    """A host with many callers keeps us out for a moment. Raises OSError, TimeoutError among them."""
    wire.settimeout(0)
    while True:
        try:
            wire.connect(str(endpoint.fds_path))
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError from None
            time.sleep(_RETRY_S)


def _take(wire: socket.socket, endpoint: Endpoint, descriptors: list[int]) -> int:
    """Add what one datagram brings to ``descriptors``; returns how many there will be. Raises OSError, LunashmError."""
    try:
        data, ancillary, flags, _ = _receive(wire)
    except ConnectionResetError:  # it closed while we spoke; what it said before that is still to be read
        data, ancillary, flags, _ = _receive(wire)
    first = len(descriptors)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(content[: len(content) - len(content) % numbers.itemsize])
            descriptors.extend(numbers)
    if not data:
        raise _hung_up(endpoint)
    header, body = protocol.split_datagram(data)
    protocol.read_header(header)
    reply = protocol.read_handed(body)
    if isinstance(reply, ErrorReply):
        raise from_code(reply.code, reply.message)
    if flags & socket.MSG_CTRUNC:
        raise _exhausted()
    _check(reply, first, len(descriptors))
    return reply.total


def _receive(wire: socket.socket) -> tuple[bytes, list[tuple[int, int, bytes]], int, object]:
    return wire.recvmsg(protocol.MAX_DATAGRAM_BYTES, _ROOM, socket.MSG_CMSG_CLOEXEC)


def _check(reply: HandedOver, first: int, now: int) -> None:
    """Raises MalformedMessage."""
    if reply.first != first or not first < now <= reply.total:
        raise MalformedMessage(
            f"the host announced descriptors from {reply.first} of {reply.total} and sent {first} to {now}"
        )


# -- what went wrong, in our words -------------------------------------------------------------------------------------


def _hung_up(endpoint: Endpoint) -> LunashmError:
    if find_host(endpoint) is None:
        return _lost(endpoint)
    return TicketRefused(
        f"the host at {endpoint.url} hung up before it had handed over all descriptors; attach again (its log says why)"
    )


def _lost(endpoint: Endpoint) -> HostLost:
    return HostLost(
        f"the host at {endpoint.url} went before it had handed over its descriptors; start it again with: lunashm serve"
    )


def _exhausted() -> SharedMemoryError:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return SharedMemoryError(
        f"this process cannot open more files (limit {limit}), and each segment takes up to two; close some, or raise "
        "the limit (ulimit -n), and attach again"
    )


def _ours(exc: OSError, endpoint: Endpoint, timeout_s: float) -> LunashmError:
    if exc.errno in _OUT_OF_DESCRIPTORS:
        return _exhausted()
    if find_host(endpoint) is None:
        return _lost(endpoint)
    if isinstance(exc, TimeoutError):
        return HostTimeout(
            f"the host at {endpoint.url} did not hand descriptors over within {timeout_s:g} s; is it stopped or "
            "swapping? (lunashm status)"
        )
    if isinstance(exc, ConnectionResetError | BrokenPipeError):
        return _hung_up(endpoint)
    return HostUnavailable(
        f"cannot fetch descriptors from {endpoint.fds_path}: {exc.strerror}; the host lives, but not there: restart it"
    )
