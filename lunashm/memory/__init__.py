"""The memory contract: what every rung (posix now; cuda-ipc, cuda-vmm, memfd later) promises.

    allocate(nbytes) -> Segment     writable until freeze(), by its owner alone
    segment.freeze()                nobody writes again, the owner included (I1)
    segment.export() -> Handle      any number of times; any number of processes may open it
    open(handle) -> Mapping         read-only, whole or not at all
    segment.free()                  the owner lets go; existing mappings follow the rung's own rule

Rungs know bytes. Tensors, models and leases are other people's words.
"""

from __future__ import annotations

from typing import Protocol

from typing_extensions import Buffer

from lunashm.errors import SegmentGone, SettingsError
from lunashm.protocol import Handle


class Segment(Protocol):
    """One exportable allocation, seen by its owner. Not thread-safe."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def frozen(self) -> bool: ...

    def write(self, offset: int, data: Buffer) -> None:
        """Copy ``data`` to ``offset`` bytes from the start.

        Raises SegmentFrozen, SegmentGone, OutOfSharedMemory, SharedMemoryError; ValueError outside the segment.
        """

    def freeze(self) -> None:
        """Idempotent."""

    def export(self) -> Handle:
        """Raises SegmentNotFrozen, or SegmentGone after :meth:`free`."""

    def free(self) -> None:
        """Idempotent."""


class Mapping(Protocol):
    """One opened segment, read-only. ``buffer`` owns the mapping: it is unmapped when the last reference to it, and to
    views made of it, dies. Buffers can be weakly referenced, so that others may learn of that moment.
    """

    @property
    def handle(self) -> Handle: ...

    @property
    def buffer(self) -> Buffer: ...


class Rung(Protocol):
    """One kind of memory on one device."""

    name: str
    device: str

    def allocate(self, nbytes: int) -> Segment:
        """Raises OutOfSharedMemory, with the sizes needed and free, before a byte is written; SharedMemoryError."""

    def open(self, handle: Handle) -> Mapping:
        """Raises SegmentGone, or SharedMemoryError where the process cannot map it."""

    def free_nbytes(self) -> int:
        """What allocate() would still grant."""

    def total_nbytes(self) -> int: ...

    def reclaim(self) -> list[str]:
        """Remove segments whose owner is dead; never those of a live one. Returns what was removed."""


def rung_for(name: str, device: str) -> Rung:
    """The rung called ``name`` on ``device``; ``auto`` takes the best that works there."""
    from lunashm.memory.posix import PosixRung  # noqa: PLC0415 - rungs import this module

    if device != "cpu":
        raise SettingsError(f"device {device!r} is not supported by this version; use --device cpu")
    if name in ("auto", PosixRung.name):
        return PosixRung()
    raise SettingsError(f"memory rung {name!r} is not known; use auto or posix")


def open_handle(handle: Handle) -> Mapping:
    """Map what a host exported, with the rung the handle names."""
    try:
        rung = rung_for(handle.rung, handle.device)
    except SettingsError as exc:
        raise SegmentGone(f"the host exports memory this client cannot open: {exc.message}") from exc
    return rung.open(handle)
