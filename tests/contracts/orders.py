"""How an order becomes a call of a method, and what comes of it an answer. Knows no rung."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import traceback
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from lunashm.errors import LunashmError
from tests.contracts import wire


class Sent(NamedTuple):
    """A descriptor that travels beside the answer."""

    descriptor: int | None


def carry_out(actor: object, call: wire.Call, descriptor: int | None = None) -> Any:
    """``descriptor`` came with the call and stays the caller's."""
    method = getattr(actor, call.name)
    hints = [hint for name, hint in typing.get_type_hints(method).items() if name != "return"]
    arguments = [msgspec.convert(value, hint) for value, hint in zip(call.arguments, hints, strict=False)]
    with starved() if call.starved else contextlib.nullcontext():
        return method(*arguments) if descriptor is None else method(*arguments, descriptor)


@contextlib.contextmanager
def starved() -> Iterator[None]:
    """No file can be opened in here: the soft limit is the lowest number that is free."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def failure(exc: Exception) -> wire.Failure:
    if isinstance(exc, LunashmError):
        return wire.Failure(exc.code, exc.message)
    if isinstance(exc, ValueError):
        return wire.Failure("ValueError", str(exc))
    return wire.Failure("bug", "".join(traceback.format_exception(exc)))


def obey(actor: object, channel: socket.socket) -> None:
    """Until the test has gone, or has closed its end."""
    while True:
        call: wire.Call
        try:
            call, descriptor = wire.receive(channel, wire.Call)
        except (EOFError, ConnectionResetError):
            return
        try:
            value = carry_out(actor, call, descriptor)
        except Exception as exc:  # noqa: BLE001 - all of them are raised in the test
            wire.send(channel, failure(exc))
        else:
            beside = value.descriptor if isinstance(value, Sent) else None
            wire.send(channel, wire.Answer(None if isinstance(value, Sent) else value), beside)
        finally:
            if descriptor is not None:
                os.close(descriptor)
