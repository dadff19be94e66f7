"""A process that owns one memory rung and obeys: ``python -m tests.contracts.actor RUNG DEVICE SOCKET``.

DEVICE is ``cpu``, a GPU's UUID, or ``first`` for the first GPU there is. Imports no torch: it starts often.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import itertools
import os
import resource
import socket
import sys
import threading
import typing
import weakref
from pathlib import Path
from typing import Any

from lunashm.memory import Mapping, Rung, Segment, rung_for
from lunashm.protocol import Handle
from tests.contracts import sight
from tests.contracts.orders import Sent, obey
from tests.contracts.scribble import scribble

_CHUNK = 4 << 20
STRIPE = 4096
"""What one write() of :meth:`Actor.write_from_threads` covers."""


class Actor:
    """What can be asked of an actor. Segments and mappings go by numbers."""

    def __init__(self, rung: Rung) -> None:
        self._rung = rung
        self._ids = itertools.count(1)
        self._segments: dict[int, Segment] = {}
        self._mappings: dict[int, Mapping] = {}

    def facts(self) -> tuple[str, str, bool]:
        return self._rung.name, self._rung.device, self._rung.outlives_host

    def free_nbytes(self) -> int:
        return self._rung.free_nbytes()

    def total_nbytes(self) -> int:
        return self._rung.total_nbytes()

    def reclaim(self) -> list[str]:
        return self._rung.reclaim()

    # -- the owner's part ----------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> tuple[int, str, int]:
        segment = self._rung.allocate(nbytes)
        number = next(self._ids)
        self._segments[number] = segment
        return number, segment.name, segment.nbytes

    def write(self, number: int, offset: int, data: bytes) -> None:
        self._segments[number].write(offset, data)

    def fill(self, number: int, byte: int) -> None:
        """All of it, so that it takes real memory."""
        segment = self._segments[number]
        chunk = bytes([byte]) * _CHUNK
        for offset in range(0, segment.nbytes, _CHUNK):
            segment.write(offset, memoryview(chunk)[: segment.nbytes - offset])

    def write_staged(self, number: int, offset: int, data: bytes) -> tuple[int, bool]:
        """By way of a staging buffer, which is used for something else at once."""
        with self._rung.staging(len(data)) as buffer:
            buffer[: len(data)] = data
            self._segments[number].write(offset, buffer[: len(data)])
            buffer[: len(data)] = bytes(len(data))
            return len(buffer), buffer.readonly

    def write_from_threads(self, number: int, threads: int) -> None:
        """Stripe i is filled with byte i % 251, by thread i % threads."""
        segment = self._segments[number]
        start = threading.Barrier(threads)
        failures: list[BaseException] = []

        def write(thread: int) -> None:
            start.wait()
            try:
                for stripe in range(thread, segment.nbytes // STRIPE, threads):
                    segment.write(stripe * STRIPE, bytes([stripe % 251]) * STRIPE)
            except BaseException as exc:  # noqa: BLE001 - raised below
                failures.append(exc)

        writers = [threading.Thread(target=write, args=(thread,)) for thread in range(threads)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        for failure in failures:
            raise failure

    def freeze(self, number: int) -> None:
        self._segments[number].freeze()

    def frozen(self, number: int) -> bool:
        return self._segments[number].frozen

    def export(self, number: int) -> Handle:
        return self._segments[number].export()

    def descriptor(self, number: int) -> Sent:
        return Sent(self._segments[number].descriptor())

    def inheritable(self, number: int) -> bool | None:
        """Whether the descriptor would reach a child; None where there is none."""
        descriptor = self._segments[number].descriptor()
        return None if descriptor is None else os.get_inheritable(descriptor)

    def free(self, number: int) -> None:
        self._segments[number].free()

    # -- the opener's part ---------------------------------------------------------------------------------------------

    def open(self, handle: Handle, descriptor: int | None = None) -> tuple[int, Handle]:
        mapping = self._rung.open(handle, descriptor)
        return self._keep(mapping), mapping.handle

    def open_with_number(self, handle: Handle, descriptor: int) -> None:
        """With a descriptor that is a number and nothing more."""
        self._rung.open(handle, descriptor)

    def hold(self, number: int) -> int:
        """One more reference to a mapping."""
        return self._keep(self._mappings[number])

    def peek(self, number: int, offset: int, nbytes: int) -> bytes:
        return bytes(self._mappings[number].peek(offset, nbytes))

    def digest(self, number: int) -> str:
        mapping = self._mappings[number]
        digest = hashlib.sha256()
        for offset in range(0, mapping.handle.nbytes, _CHUNK):
            digest.update(mapping.peek(offset, min(_CHUNK, mapping.handle.nbytes - offset)))
        return digest.hexdigest()

    def buffer_is_read_only(self, number: int) -> bool:
        """RAM only: a mapping is a buffer there."""
        return memoryview(typing.cast(Any, self._mappings[number])).readonly

    def when_gone(self, number: int, path: str) -> None:
        """Every call leaves a line in ``path``, whatever has become of this process."""
        self._mappings[number].when_gone(lambda: sight.append(Path(path), "gone"))

    def drop(self, number: int) -> bool:
        """Let go of a mapping. Returns whether it is gone: not while it is held elsewhere."""
        gone = weakref.ref(self._mappings.pop(number))
        gc.collect()
        return gone() is None

    def scribble(self, number: int, byte: int) -> str:
        """Try to write where nobody may. Returns the driver's refusal; a CPU refuses by killing."""
        try:
            scribble(self._mappings[number], byte)
        except OSError as exc:
            return str(exc)
        return ""

    # -- the process ---------------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, int]:
        return sight.counts()

    def seen_by_a_child(self) -> list[str]:
        return sight.seen_by_a_child()

    def libraries(self, name: str) -> list[str]:
        return sight.libraries(name)

    def clean(self) -> None:
        """Whatever a test left."""
        for segment in self._segments.values():
            segment.free()
        self._segments.clear()
        self._mappings.clear()
        gc.collect()

    def _keep(self, mapping: Mapping) -> int:
        number = next(self._ids)
        self._mappings[number] = mapping
        return number


def rung_of(name: str, device: str) -> Rung:
    if device == "first":
        from lunashm.memory import cuda

        device = cuda.devices()[0].uuid
    return rung_for(name, device)


def main(name: str, device: str, number: str) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # some actors are meant to crash
    os.set_inheritable(int(number), False)
    actor = Actor(rung_of(name, device))
    atexit.register(lambda: actor)  # what it has mapped lives as long as the interpreter
    with socket.socket(fileno=int(number)) as channel:
        obey(actor, channel)


if __name__ == "__main__":
    main(*sys.argv[1:])
