"""Messages between a test and its actors, one packet each, a descriptor beside them. Knows nothing of memory."""

from __future__ import annotations

import socket
from typing import Any, TypeVar

import msgspec

_PACKET = 1 << 18
"""More than the kernel lets through; what a test writes or peeks at once is smaller."""

_T = TypeVar("_T")


class Call(msgspec.Struct, frozen=True):
    """``starved``: to be carried out without room for another file descriptor."""

    name: str
    arguments: tuple[Any, ...]
    starved: bool = False


class Answer(msgspec.Struct, frozen=True, tag=True):
    value: Any = None


class Failure(msgspec.Struct, frozen=True, tag=True):
    """``code``: of lunashm.errors, ``ValueError``, or ``bug`` with a traceback for whatever nobody should raise."""

    code: str
    message: str


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(channel: socket.socket, message: msgspec.Struct, descriptor: int | None = None) -> None:
    descriptors = [] if descriptor is None else [descriptor]
    socket.send_fds(channel, [msgspec.msgpack.encode(message)], descriptors)


def receive(channel: socket.socket, kind: type[_T] | Any) -> tuple[_T, int | None]:
    """A message of ``kind`` and the descriptor beside it, which is the caller's. Raises EOFError, TimeoutError."""
    data, descriptors, _, _ = socket.recv_fds(channel, _PACKET, 1, socket.MSG_CMSG_CLOEXEC)
    if not data:
        raise EOFError
    return msgspec.msgpack.decode(data, type=kind), descriptors[0] if descriptors else None
