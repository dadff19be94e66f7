"""The ``memfd`` rung: sealed anonymous files. Bytes outlive the host for whoever has them mapped; there is no name to
leak and no /dev/shm to fill; read-only is enforced by the kernel's seals, on the owner too.

The descriptor travels beside the handle (SCM_RIGHTS), opened read-only.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path

from lunashm.errors import OutOfSharedMemory, SegmentGone
from lunashm.memory import ram
from lunashm.memory.files import FileMapping, FileRung, FileSegment, map_file, size
from lunashm.memory.room import Room
from lunashm.memory.segment import check_size
from lunashm.protocol import Handle

_PREFIX = "lunashm-"
_NAME = re.compile(rb"memfd:[0-9a-f]{16}")
_NOEXEC_SEAL = 8
"""MFD_NOEXEC_SEAL, Linux 6.3: such a file can never become a program. Older kernels refuse the flag with EINVAL."""

FROZEN = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
"""What the kernel refuses for ever, whoever asks: writing, resizing, and taking these seals off."""


class MemfdSegment(FileSegment):
    def _lock_down(self, fd: int) -> int:
        reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)  # first: sealing cannot be done twice
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, FROZEN)
        except OSError:
            os.close(reader)
            raise
        return reader

    def descriptor(self) -> int:
        self.export()
        return self._fd


class MemfdRung(FileRung):
    name = "memfd"

    def __init__(self) -> None:
        super().__init__(Room(ram.available))

    def allocate(self, nbytes: int) -> MemfdSegment:
        check_size(nbytes)
        name = f"memfd:{secrets.token_hex(8)}"
        try:
            fd = _create(_PREFIX + name)
        except OSError as exc:
            raise self.map_error(exc, f"creating segment {name}", nbytes) from exc
        segment = MemfdSegment(self, name, nbytes, fd)
        self._reserve(segment, fd)
        return segment

    def open(self, handle: Handle, descriptor: int | None = None) -> FileMapping:
        if not _NAME.fullmatch(handle.data):
            raise SegmentGone(f"the host names shared memory {handle.data!r}, which no memfd rung makes")
        name = handle.data.decode()
        if descriptor is None:
            raise SegmentGone(f"segment {name} came without its descriptor; attach again")
        try:
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & FROZEN != FROZEN:
                raise SegmentGone(f"the descriptor of segment {name} is not sealed: another file; attach again")
            if _PREFIX + name not in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                raise SegmentGone(f"the descriptor of segment {name} is another segment's; attach again")
            return map_file(descriptor, handle)
        except OSError as exc:
            raise self.map_error(exc, f"mapping segment {name}", handle.nbytes) from exc

    def total_nbytes(self) -> int:
        return ram.total()

    def reclaim(self) -> list[str]:
        """The kernel frees a memfd with the last process that has it: nothing is ever left."""
        return []

    def _no_room(self, nbytes: int, free: int) -> OutOfSharedMemory:
        return OutOfSharedMemory(
            f"RAM has no room: {size(nbytes)} needed, {size(free)} free of {size(ram.total())}; unload a model, or "
            "close other programs (in a container: raise its memory limit)"
        )


def _create(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _NOEXEC_SEAL)
    except OSError:  # EINVAL of an older kernel; whatever else it is will come again
        return os.memfd_create(name, flags)


__all__ = ["FROZEN", "MemfdRung", "MemfdSegment"]
