"""The ``posix`` rung: named shared memory in /dev/shm. Bytes outlive the host; read-only is enforced by the kernel.

Ownership is a shared flock on the segment's own file: the kernel drops it with the owner, so whether a segment is
an orphan never depends on pids, which containers that share /dev/shm would read differently.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path

import posix_ipc

from lunashm.errors import OutOfSharedMemory, SegmentGone
from lunashm.memory import ram
from lunashm.memory.files import FileMapping, FileRung, FileSegment, map_file, size
from lunashm.memory.room import Room
from lunashm.memory.segment import check_size
from lunashm.protocol import Handle

_DIRECTORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
_PREFIX = "lunashm-"
_NAME = re.compile(rb"/lunashm-[0-9]{1,10}-[0-9a-f]{16}")


class PosixSegment(FileSegment):
    def _lock_down(self, fd: int) -> int:
        os.fchmod(fd, 0o400)
        reader = os.open(_path(self._name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        if not os.path.sameopenfile(reader, fd):
            os.close(reader)
            raise SegmentGone(f"segment {self._name} was removed by another program while it was filled; load it again")
        fcntl.flock(reader, fcntl.LOCK_SH)  # both descriptors hold it for a moment: it is never without an owner
        return reader

    def descriptor(self) -> None:
        self.export()

    def _unname(self) -> None:
        """Mappings that exist keep their bytes; nobody new can open it."""
        _path(self._name).unlink(missing_ok=True)


class PosixRung(FileRung):
    """Room in /dev/shm, or free RAM where that is less."""

    name = "posix"

    def __init__(self) -> None:
        super().__init__(Room(lambda: min(shm_free(), ram.available())))

    def allocate(self, nbytes: int) -> PosixSegment:
        check_size(nbytes)
        while True:
            name = f"/{_PREFIX}{os.getuid()}-{secrets.token_hex(8)}"
            try:
                fd = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600).fd
            except posix_ipc.ExistentialError:
                continue
            except (posix_ipc.Error, OSError) as exc:
                raise self.map_error(exc, f"creating segment {name}", nbytes) from exc
            os.set_inheritable(fd, False)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # a starting host took it for an orphan between the two calls above
                os.close(fd)
                continue
            if os.fstat(fd).st_nlink == 0:  # ... and has removed it already
                os.close(fd)
                continue
            segment = PosixSegment(self, name, nbytes, fd)
            self._reserve(segment, fd)
            return segment

    def open(self, handle: Handle, descriptor: int | None = None) -> FileMapping:
        if not _NAME.fullmatch(handle.data):
            raise SegmentGone(f"the host names shared memory {handle.data!r}, which no posix rung makes")
        name = handle.data.decode()
        try:
            fd = posix_ipc.SharedMemory(name, read_only=True).fd
        except posix_ipc.ExistentialError as exc:
            raise SegmentGone(f"shared memory {name} is gone (host stopped, or model unloaded); attach again") from exc
        except (posix_ipc.Error, OSError) as exc:
            raise self.map_error(exc, f"opening shared memory {name}", handle.nbytes) from exc
        try:
            return map_file(fd, handle)
        except OSError as exc:
            raise self.map_error(exc, f"mapping shared memory {name}", handle.nbytes) from exc
        finally:
            os.close(fd)

    def total_nbytes(self) -> int:
        return shm_total()

    def reclaim(self) -> list[str]:
        removed = []
        for path in sorted(_DIRECTORY.glob(f"{_PREFIX}{os.getuid()}-*")):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue  # freed by its owner meanwhile
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path.name)
            except OSError:
                continue  # its owner lives, or freed it meanwhile
            finally:
                os.close(fd)
        return removed

    def _no_room(self, nbytes: int, free: int) -> OutOfSharedMemory:
        needed = f"{size(nbytes)} needed, {size(free)} free"
        if shm_free() > ram.available():
            return OutOfSharedMemory(f"RAM has no room: {needed}; unload a model, or close other programs")
        return OutOfSharedMemory(
            f"{_DIRECTORY} has no room: {needed} of {size(shm_total())}; unload a model, or enlarge it: mount -o "
            "remount,size=SIZE /dev/shm (docker: --shm-size SIZE), or do without it: lunashm serve --memory memfd"
        )


def shm_total() -> int:
    """Bytes that /dev/shm may hold; 0 where there is none."""
    try:
        room = os.statvfs(_DIRECTORY)
    except OSError:
        return 0
    return room.f_blocks * room.f_frsize


def shm_free() -> int:
    room = os.statvfs(_DIRECTORY)
    return room.f_bavail * room.f_frsize


def _path(name: str) -> Path:
    return _DIRECTORY / name.removeprefix("/")


__all__ = ["PosixRung", "PosixSegment", "shm_total"]
