"""Owners and users of segments, each a process of its own on the stand-in."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from lunashm.protocol import Handle
from tests.standin.process import Process

_SETUP = """
import contextlib, ctypes, gc, os
from lunashm import errors
from lunashm.memory import cuda, open_handle, rung_for
from tests.standin import control
"""

GPUS = ("GPU-aaaaaaaa-0000-4000-8000-000000000000", "GPU-bbbbbbbb-0000-4000-8000-000000000001")
"""By their place in the machine."""


@contextmanager
def peer(**variables: str | None) -> Iterator[Process]:
    """A process with the imports that these tests need."""
    with Process(**variables) as process:
        process(_SETUP)
        yield process


@contextmanager
def owner(rung: str, gpu: str = GPUS[0], **variables: str | None) -> Iterator[Process]:
    """A peer that has ``rung``, and ``segment``: frozen, 1000 bytes, b"shared" at 10."""
    with peer(**variables) as process:
        process("rung = rung_for(name, gpu)", name=rung, gpu=gpu)
        process('segment = rung.allocate(1000); segment.write(10, b"shared"); segment.freeze()')
        yield process


def lend(host: Process, segment: str = "segment") -> tuple[Handle, int | None]:
    """The handle, and the caller's own duplicate of the descriptor, where the rung has one."""
    handle = host(f"if {segment}.descriptor() is not None: lent.append({segment}.descriptor())\n{segment}.export()")
    return handle, (host.received[0] if host.received else None)


def use(client: Process, handle: Handle, descriptor: int | None, mapping: str = "mapping") -> None:
    fds = () if descriptor is None else (descriptor,)
    client(f"{mapping} = open_handle(handle, fds[0] if fds else None)", fds, handle=handle)


def attach(host: Process, client: Process, segment: str = "segment", mapping: str = "mapping") -> Handle:
    handle, descriptor = lend(host, segment)
    try:
        use(client, handle, descriptor, mapping)
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return handle
