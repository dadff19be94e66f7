"""Segments that are files in RAM (tmpfs), and their mappings: what ``posix`` and ``memfd`` have in common."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import weakref
from collections.abc import Callable, Iterator
from typing import Protocol

from typing_extensions import Buffer

from lunashm.errors import OutOfSharedMemory, SegmentFrozen, SegmentGone, SegmentNotFrozen, SharedMemoryError
from lunashm.memory import CPU
from lunashm.memory.room import Room
from lunashm.protocol import Handle

_NO_ROOM = {errno.ENOSPC, errno.ENOMEM, errno.EDQUOT}


class FileMapping(mmap.mmap):
    """A PROT_READ mapping of a whole file. Made by :func:`map_file` alone.

    Never call close(): torch keeps a plain reference to a buffer's owner, not an export count, so closing would
    unmap memory under live tensors. Dropping the last reference unmaps it.
    """

    handle: Handle

    def peek(self, offset: int, nbytes: int) -> memoryview:
        if offset < 0 or nbytes < 0 or offset + nbytes > len(self):
            raise ValueError(f"{nbytes} bytes at {offset} are not in a segment of {len(self)} bytes")
        return memoryview(self)[offset : offset + nbytes]

    def when_gone(self, callback: Callable[[], object]) -> None:
        """Called a moment before the pages are unmapped; file memory does not mind when its owner frees it."""
        weakref.finalize(self, callback).atexit = False


def map_file(fd: int, handle: Handle) -> FileMapping:
    """Raises SegmentGone for a file of another size, OSError."""
    size = os.fstat(fd).st_size
    if size != handle.nbytes or size == 0:
        raise SegmentGone(f"the segment has {size} bytes, the host said {handle.nbytes}; attach again")
    mapping = FileMapping(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    mapping.handle = handle
    return mapping


class FileRung(Protocol):
    """What a segment asks of its rung."""

    name: str
    room: Room

    def map_error(self, exc: Exception, doing: str, nbytes: int) -> SharedMemoryError: ...


class FileSegment:
    """A segment this process owns. Written with pwrite, so that memory which runs out is an error here, never a
    SIGBUS. Subclasses say what freezing, naming and freeing mean."""

    def __init__(self, rung: FileRung, name: str, nbytes: int, fd: int) -> None:
        self._rung = rung
        self._name = name
        self._nbytes = nbytes
        self._fd = fd
        self._frozen = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def frozen(self) -> bool:
        return self._frozen

    def write(self, offset: int, data: Buffer) -> None:
        self._check_there()
        if self._frozen:
            raise SegmentFrozen(f"segment {self._name} is frozen; its bytes never change again")
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > self._nbytes:
            raise ValueError(f"{len(view)} bytes at {offset} do not fit segment {self._name} ({self._nbytes} bytes)")
        while view:
            try:
                written = os.pwrite(self._fd, view, offset)
            except OSError as exc:
                raise self._rung.map_error(exc, f"writing segment {self._name}", self._nbytes) from exc
            view, offset = view[written:], offset + written

    def freeze(self) -> None:
        """Swap the writable descriptor for a read-only one that nobody can write through (I1)."""
        self._check_there()
        if self._frozen:
            return
        try:
            reader = self._lock_down(self._fd)
        except OSError as exc:
            raise self._rung.map_error(exc, f"freezing segment {self._name}", self._nbytes) from exc
        self._rung.room.settle(self._name)
        os.close(self._fd)
        self._fd = reader
        self._frozen = True

    def export(self) -> Handle:
        self._check_there()
        if not self._frozen:
            raise SegmentNotFrozen(f"segment {self._name} is still writable; freeze() it before exporting it")
        return Handle(rung=self._rung.name, device=CPU, nbytes=self._nbytes, data=self._name.encode())

    def free(self) -> None:
        if self._fd < 0:
            return
        self._rung.room.settle(self._name)
        self._unname()
        os.close(self._fd)
        self._fd = -1

    def _lock_down(self, fd: int) -> int:
        """Make ``fd``'s file unwritable for everybody; returns a read-only descriptor of it. Raises OSError."""
        raise NotImplementedError

    def _unname(self) -> None:
        """Have nobody find it any more."""

    def _check_there(self) -> None:
        if self._fd < 0:
            raise SegmentGone(f"segment {self._name} was freed")


def reserve(segment: FileSegment, rung: FileRung, fd: int, no_room: Callable[[int, int], OutOfSharedMemory]) -> None:
    """Size a new segment's file, if there is room; else free it. Raises OutOfSharedMemory, SharedMemoryError."""
    try:
        free = rung.room.promise(segment.name, fd, segment.nbytes)
        if free is not None:
            raise no_room(segment.nbytes, free)
        os.ftruncate(fd, segment.nbytes)
    except OSError as exc:
        segment.free()
        raise rung.map_error(exc, f"sizing segment {segment.name}", segment.nbytes) from exc
    except BaseException:
        segment.free()
        raise


def out_of_room(exc: Exception) -> bool:
    return isinstance(exc, OSError) and exc.errno in _NO_ROOM


@contextlib.contextmanager
def plain_staging(nbytes: int) -> Iterator[memoryview]:
    """pwrite copies from any memory alike."""
    yield memoryview(bytearray(nbytes))


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
