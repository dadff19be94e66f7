"""Which host a command talks to, and how it asks. Knows no command and no output."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Annotated, TypeVar

import typer

from lunashm import settings
from lunashm.client.connection import Connection
from lunashm.endpoints import endpoint_of
from lunashm.errors import HostUnavailable, LunashmError
from lunashm.paths import Endpoint, all_endpoints, find_host, nobody_at
from lunashm.protocol import Message
from lunashm.settings import Settings

EndpointFlag = Annotated[
    str | None, typer.Option("--endpoint", metavar="URL", help="The host's control URL, ipc:///path.sock.")
]
DeviceFlag = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="The host of this device: cpu, cuda:N or a GPU's UUID.")
]

NONE = "no lunashm host is running; start one with: lunashm serve"

_Answer = TypeVar("_Answer", bound=Message)


def one(endpoint: str | None, device: str | None) -> Endpoint:
    """The endpoint a command acts on.

    Where nothing names one and the default device has no host, the only live host is meant.
    """
    chosen = settings.load({"endpoint": endpoint, "device": device})
    if chosen.endpoint:
        return Endpoint.parse(chosen.endpoint)
    own = endpoint_of(chosen)
    if chosen.device == Settings().device and device is None and find_host(own) is None:
        live = _live()
        if len(live) == 1:
            return live[0]
    return own


def every(endpoint: str | None, device: str | None) -> list[Endpoint]:
    """All live hosts, or the one that is named. Raises HostUnavailable if there is none."""
    found = over_time(endpoint, device)()
    if not found:
        raise HostUnavailable(NONE)
    for named in found:
        if find_host(named) is None:
            raise nobody_at(named)
    return found


def over_time(endpoint: str | None, device: str | None) -> Callable[[], list[Endpoint]]:
    """Says whenever it is called which hosts are meant: all that live then, or the one that is named, live or not."""
    if settings.load({"endpoint": endpoint}).endpoint or device is not None:
        named = one(endpoint, device)
        return lambda: [named]
    return _live


def _live() -> list[Endpoint]:
    return [endpoint for endpoint in all_endpoints() if find_host(endpoint) is not None]


@contextlib.contextmanager
def connected(endpoint: Endpoint) -> Iterator[Connection]:
    """A connection for a few requests; the host does not count us as a client."""
    connection = Connection(endpoint)
    try:
        yield connection
    finally:
        connection.close()


def ask(connection: Connection, request: Message, kind: type[_Answer]) -> _Answer:
    """Send, wait, and insist on the kind of answer that belongs to the request."""
    reply = connection.request(request)
    if not isinstance(reply, kind):
        raise LunashmError(f"the host answered {type(request).__name__} with {type(reply).__name__}")
    return reply


def ask_once(endpoint: Endpoint, request: Message, kind: type[_Answer]) -> _Answer:
    with connected(endpoint) as connection:
        return ask(connection, request, kind)
