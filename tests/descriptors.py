"""Raw talk where descriptors are handed over, leases without mappings, and counts of what a process holds."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from lunashm import protocol as p
from lunashm.client import handover
from lunashm.client.connection import Connection
from lunashm.host.catalog import Generation
from lunashm.host.checkpoint import identify
from lunashm.manifest import DtypeRule, Manifest, TensorSpec
from lunashm.memory import Rung
from lunashm.paths import Endpoint
from lunashm.process import namespace, start_ticks

AS_STORED = (DtypeRule("", ""),)


def open_files(pid: int | str = "self") -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def mapped(pid: int | str = "self") -> int:
    """Mappings of memory that has no name."""
    return Path(f"/proc/{pid}/maps").read_text().count("/memfd:lunashm-")


def granted(connection: Connection, path: Path, pid: int | None = None) -> p.Attached:
    """A lease and its ticket, for a client of its own."""
    pid = os.getpid() if pid is None else pid
    registered = connection.request(p.Register(p.ClientInfo(pid, namespace(), start_ticks(pid), "test", "", "0")))
    assert isinstance(registered, p.Registered)
    reply = connection.request(p.Attach(registered.client, str(path), AS_STORED, 60.0), 60.0)
    assert isinstance(reply, p.Attached)
    return reply


@contextlib.contextmanager
def connected(endpoint: Endpoint) -> Iterator[socket.socket]:
    """One who says nothing by itself."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as wire:
        wire.settimeout(20)
        wire.connect(str(endpoint.fds_path))
        yield wire


def heard(wire: socket.socket) -> bytes:
    """The next datagram; empty when the host has hung up, which a reset says too."""
    try:
        return wire.recv(1 << 16)
    except ConnectionResetError:
        return b""


def refusal(endpoint: Endpoint, *datagrams: bytes) -> tuple[str, int] | None:
    """The code and the message id of the host's answer, after which it has to hang up; None for no answer."""
    with connected(endpoint) as wire:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for datagram in datagrams:
                wire.send(datagram)
        answer = heard(wire) or heard(wire)
        if not answer:
            return None
        assert heard(wire) == b""
    header, body = p.split_datagram(answer)
    reply = p.read_handed(body)
    assert isinstance(reply, p.ErrorReply), reply
    return reply.code, p.read_header(header)


def fetched(endpoint: Endpoint, ticket: bytes) -> int:
    """How many descriptors a ticket brings; they are closed again."""
    descriptors = handover.redeem(endpoint, ticket)
    handover.close_all(list(descriptors))
    return len(descriptors)


def generation_of_many(rung: Rung, path: Path, count: int) -> Generation:
    """``path`` as if it had been loaded into ``count`` segments, with one tensor in each that holds its number."""
    segments = []
    for number in range(count):
        segment = rung.allocate(256)
        segment.write(0, number.to_bytes(4, "little"))
        segment.freeze()
        segments.append(segment)
    specs = tuple(TensorSpec(f"tensor{number}", "I32", "I32", (), number, 0, 4) for number in range(count))
    source = identify(path)
    manifest = Manifest(path.name, "ab12" * 16, 1000, source, AS_STORED, specs, (256,) * count, {})
    return Generation(manifest, tuple(segments), 0.0, rung.name, {source})


