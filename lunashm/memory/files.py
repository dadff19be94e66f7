"""Segments that are files in RAM (tmpfs), and their mappings: what ``posix`` and ``memfd`` have in common."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager

from lunashm.errors import OutOfSharedMemory, SegmentGone, SharedMemoryError
from lunashm.memory import CPU
from lunashm.memory.room import Room
from lunashm.memory.segment import OwnedSegment
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


class FileRung:
    """RAM in files. ``room``: what of it is still free to promise."""

    name: str
    device = CPU
    outlives_host = True

    def __init__(self, room: Room) -> None:
        self.room = room

    def staging(self, nbytes: int) -> AbstractContextManager[memoryview]:
        return plain_staging(nbytes)

    def free_nbytes(self) -> int:
        """What is free, minus what segments in the making were promised."""
        return self.room.free()

    def map_error(self, exc: Exception, doing: str, nbytes: int) -> SharedMemoryError:
        """Ours for a foreign error, at this edge only."""
        if isinstance(exc, OSError) and exc.errno in _NO_ROOM:
            return self._no_room(nbytes, self.free_nbytes())
        return SharedMemoryError(f"{doing} failed: {exc}")

    def _no_room(self, nbytes: int, free: int) -> OutOfSharedMemory:
        """What to say, with the sizes, and what to do about it."""
        raise NotImplementedError

    def _reserve(self, segment: FileSegment, fd: int) -> None:
        """Size a new segment's file, if there is room; else free it. Raises OutOfSharedMemory, SharedMemoryError."""
        try:
            free = self.room.promise(segment.name, fd, segment.nbytes)
            if free is not None:
                raise self._no_room(segment.nbytes, free)
            os.ftruncate(fd, segment.nbytes)
        except OSError as exc:
            segment.free()
            raise self.map_error(exc, f"sizing segment {segment.name}", segment.nbytes) from exc
        except BaseException:
            segment.free()
            raise


class FileSegment(OwnedSegment):
    """Written with pwrite, so that memory which runs out is an error here, never a SIGBUS."""

    def __init__(self, rung: FileRung, name: str, nbytes: int, fd: int) -> None:
        super().__init__(name, nbytes)
        self._rung = rung
        self._fd = fd

    def _put(self, offset: int, view: memoryview) -> None:
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
        self._check_exportable()
        return Handle(rung=self._rung.name, device=CPU, nbytes=self._nbytes, data=self._name.encode())

    def free(self) -> None:
        if self._freed:
            return
        self._freed = True
        self._rung.room.settle(self._name)
        self._unname()
        os.close(self._fd)
        self._fd = -1

    def _lock_down(self, fd: int) -> int:
        """Make ``fd``'s file unwritable for everybody; returns a read-only descriptor of it. Raises OSError."""
        raise NotImplementedError

    def _unname(self) -> None:
        """Have nobody find it any more."""


def plain_staging(nbytes: int) -> AbstractContextManager[memoryview]:
    """pwrite copies from any memory alike."""
    return contextlib.nullcontext(memoryview(bytearray(nbytes)))


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
