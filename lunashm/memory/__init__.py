"""The memory contract: what every rung (posix, memfd, cuda-ipc, cuda-vmm) promises.

    allocate(nbytes) -> Segment     writable until freeze(), by its owner alone
    segment.freeze()                nobody writes again, the owner included (I1)
    segment.export() -> Handle      any number of times; any number of processes may open it
    segment.descriptor()            what has to travel beside the handle, on rungs whose memory has no name
    open(handle, descriptor)        -> Mapping: read-only, whole or not at all
    segment.free()                  the owner lets go; existing mappings follow the rung's own rule

Rungs know bytes. Tensors, models and leases are other people's words.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from typing_extensions import Buffer

from lunashm.errors import SegmentGone, SettingsError
from lunashm.protocol import Handle

CPU = "cpu"
"""The device of shared memory in RAM; every other device is a GPU, named by its UUID (``GPU-...``)."""


class Segment(Protocol):
    """One exportable allocation, seen by its owner."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def frozen(self) -> bool: ...

    def write(self, offset: int, data: Buffer) -> None:
        """Copy ``data`` to ``offset`` bytes from the start; ``data`` may be reused when this returns.

        Several threads may write at once, to stretches that do not overlap; nothing else here is thread-safe.
        What nobody wrote is zero. Raises SegmentFrozen, SegmentGone, OutOfSharedMemory, SharedMemoryError; ValueError
        outside the segment.
        """

    def freeze(self) -> None:
        """Idempotent."""

    def export(self) -> Handle:
        """Raises SegmentNotFrozen, or SegmentGone after :meth:`free`."""

    def descriptor(self) -> int | None:
        """The file descriptor that :meth:`Rung.open` needs beside the handle, None where the handle is enough.

        It stays the segment's own: send it (SCM_RIGHTS) or duplicate it, never close it. Raises as :meth:`export`.
        """

    def free(self) -> None:
        """Idempotent."""


class Mapping(Protocol):
    """One opened segment, read-only. Tensors made of it keep it alive; it is unmapped when the last reference goes.

    It can be weakly referenced, and in RAM it is a buffer.
    """

    @property
    def handle(self) -> Handle: ...

    def peek(self, offset: int, nbytes: int) -> Buffer:
        """A stretch of it in this process's RAM: a view where it lies there anyway, else a copy.

        Raises ValueError outside the segment, SharedMemoryError.
        """

    def when_gone(self, callback: Callable[[], object]) -> None:
        """Call ``callback`` when nobody in this process can reach the memory any more, but not at interpreter exit.

        The owner may free the memory as soon as it hears of this. Called in whichever thread dropped the last
        reference, in the middle of anything: take no lock there that this thread might hold.
        """


class Rung(Protocol):
    """One kind of memory on one device.

    ``outlives_host``: mappings stay valid when the owner's process dies. Where they do not, whoever maps must watch
    the owner, from before the mapping, and stop using the memory when it is gone (``lunashm.client.watch``).
    """

    name: str
    device: str
    outlives_host: bool

    def allocate(self, nbytes: int) -> Segment:
        """Raises OutOfSharedMemory, with the sizes needed and free, before a byte is written; SharedMemoryError."""

    def open(self, handle: Handle, descriptor: int | None = None) -> Mapping:
        """``descriptor``: a duplicate of the segment's; the caller closes it, whatever happens here.

        Raises SegmentGone, WrongDevice where this process cannot use the handle's device, or SharedMemoryError.
        """

    def staging(self, nbytes: int) -> AbstractContextManager[memoryview]:
        """A writable buffer that :meth:`Segment.write` copies from fastest (page-locked where that matters).

        Raises SharedMemoryError.
        """

    def free_nbytes(self) -> int:
        """What allocate() would still grant."""

    def total_nbytes(self) -> int: ...

    def reclaim(self) -> list[str]:
        """Remove segments whose owner is dead; never those of a live one. Returns what was removed."""


ON_CPU = ("posix", "memfd")
ON_GPU = ("cuda-vmm", "cuda-ipc")
"""The names of the rungs of each kind of device, the one that is taken first, first."""


@functools.cache
def rung_for(name: str, device: str) -> Rung:
    """The one rung of this process called ``name`` on ``device`` (``cpu`` or a GPU's UUID).

    Whether it works here is another question: ``lunashm.memory.probe`` asks it. Raises SettingsError for a name or a
    device that there is not, WrongDevice for a GPU that this process does not see.
    """
    # rungs import this module, and those of a GPU are not wanted without one
    if device == CPU and name == "posix":
        from lunashm.memory.posix import PosixRung  # noqa: PLC0415

        return PosixRung()
    if device == CPU and name == "memfd":
        from lunashm.memory.memfd import MemfdRung  # noqa: PLC0415

        return MemfdRung()
    if device != CPU and name == "cuda-vmm":
        from lunashm.memory.cuda_vmm import CudaVmmRung  # noqa: PLC0415

        return CudaVmmRung(device)
    if device != CPU and name == "cuda-ipc":
        from lunashm.memory.cuda_ipc import CudaIpcRung  # noqa: PLC0415

        return CudaIpcRung(device)
    choices = ", ".join(ON_CPU if device == CPU else ON_GPU)
    raise SettingsError(f"there is no memory rung {name!r} on {device}; use one of {choices}, or auto")


def open_handle(handle: Handle, descriptor: int | None = None) -> Mapping:
    """Map what a host exported, with the rung the handle names. Raises as :meth:`Rung.open`."""
    return rung_of(handle).open(handle, descriptor)


def rung_of(handle: Handle) -> Rung:
    """The rung that a handle names. Raises SegmentGone for one that this version does not have, WrongDevice."""
    try:
        return rung_for(handle.rung, handle.device)
    except SettingsError as exc:
        raise SegmentGone(f"the host exports memory this client cannot open: {exc.message}") from exc
