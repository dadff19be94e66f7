"""The ``posix`` rung: named shared memory in /dev/shm. Bytes outlive the host; read-only is enforced by the kernel.

Ownership is a shared flock on the segment's own file: the kernel drops it with the owner, so whether a segment is
an orphan never depends on pids, which containers that share /dev/shm would read differently.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import threading
from pathlib import Path

import posix_ipc
from typing_extensions import Buffer

from lunashm.errors import OutOfSharedMemory, SegmentFrozen, SegmentGone, SegmentNotFrozen, SharedMemoryError
from lunashm.memory import ram
from lunashm.protocol import Handle

_DIRECTORY = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory
_PREFIX = "lunashm-"
_NAME = re.compile(rb"/lunashm-[0-9]{1,10}-[0-9a-f]{16}")
_NO_ROOM = {errno.ENOSPC, errno.ENOMEM, errno.EDQUOT}


class Region(mmap.mmap):
    """A PROT_READ mapping that can be weakly referenced.

    Never call close(): torch keeps a plain reference to the buffer's owner, not an export count, so closing would
    unmap memory under live tensors. Dropping the last reference unmaps it.
    """


class PosixSegment:
    """A segment this process owns. Written with pwrite, so a full /dev/shm is an error here, never a SIGBUS."""

    def __init__(self, rung: PosixRung, name: str, nbytes: int, fd: int) -> None:
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
        """Swap the writable descriptor for a read-only one and take write permission off the file (I1)."""
        self._check_there()
        if self._frozen:
            return
        try:
            os.fchmod(self._fd, 0o400)
            reader = os.open(_path(self._name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as exc:
            raise self._rung.map_error(exc, f"freezing segment {self._name}", self._nbytes) from exc
        if not os.path.sameopenfile(reader, self._fd):
            os.close(reader)
            raise SegmentGone(f"segment {self._name} was removed by another program while it was filled; load it again")
        fcntl.flock(reader, fcntl.LOCK_SH)  # both descriptors hold it for a moment: it is never without an owner
        self._rung.settle(self._name)
        os.close(self._fd)
        self._fd = reader
        self._frozen = True

    def export(self) -> Handle:
        self._check_there()
        if not self._frozen:
            raise SegmentNotFrozen(f"segment {self._name} is still writable; freeze() it before exporting it")
        return Handle(rung=PosixRung.name, device=PosixRung.device, nbytes=self._nbytes, data=self._name.encode())

    def free(self) -> None:
        """Remove the name. Mappings that exist keep their bytes; nobody new can open it."""
        if self._fd < 0:
            return
        self._rung.settle(self._name)
        _path(self._name).unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1

    def _check_there(self) -> None:
        if self._fd < 0:
            raise SegmentGone(f"segment {self._name} was freed")


class PosixMapping:
    def __init__(self, handle: Handle, region: Region) -> None:
        self._handle = handle
        self._region = region

    @property
    def handle(self) -> Handle:
        return self._handle

    @property
    def buffer(self) -> Region:
        return self._region


class PosixRung:
    """``_promised``: descriptor and size of each segment that is still being filled. tmpfs counts pages when they are
    written, so two loads at once would otherwise both be told that there is room for one."""

    name = "posix"
    device = "cpu"

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._promised: dict[str, tuple[int, int]] = {}

    def allocate(self, nbytes: int) -> PosixSegment:
        if nbytes <= 0:
            raise ValueError(f"a segment has at least one byte, not {nbytes}")
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
            try:
                self._promise(name, fd, nbytes)
                os.ftruncate(fd, nbytes)
            except OSError as exc:
                segment.free()
                raise self.map_error(exc, f"sizing segment {name}", nbytes) from exc
            except BaseException:
                segment.free()
                raise
            return segment

    def open(self, handle: Handle) -> PosixMapping:
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
            size = os.fstat(fd).st_size
            if size != handle.nbytes or size == 0:
                raise SegmentGone(f"shared memory {name} has {size} bytes, the host said {handle.nbytes}; attach again")
            return PosixMapping(handle, Region(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))
        except OSError as exc:
            raise self.map_error(exc, f"mapping shared memory {name}", handle.nbytes) from exc
        finally:
            os.close(fd)

    def free_nbytes(self) -> int:
        """Room in /dev/shm, or free RAM where that is less, minus what segments in the making were promised."""
        with self._mutex:
            return self._free()

    def total_nbytes(self) -> int:
        room = os.statvfs(_DIRECTORY)
        return room.f_blocks * room.f_frsize

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

    # -- for this rung's segments ----------------------------------------------------------------------------------

    def settle(self, name: str) -> None:
        """A segment is complete, or about to go: nothing is promised to it, its descriptor is not looked at again."""
        with self._mutex:
            self._promised.pop(name, None)

    def map_error(self, exc: Exception, doing: str, nbytes: int) -> SharedMemoryError:
        """Ours for a foreign error, at this edge only."""
        if isinstance(exc, OSError) and exc.errno in _NO_ROOM:
            return self._no_room(nbytes, self.free_nbytes())
        return SharedMemoryError(f"{doing} failed: {exc}")

    def _promise(self, name: str, fd: int, nbytes: int) -> None:
        """Raises OutOfSharedMemory, before anything is written."""
        with self._mutex:
            free = self._free()
            if nbytes > free:
                raise self._no_room(nbytes, free)
            self._promised[name] = (fd, nbytes)

    def _free(self) -> int:
        room = os.statvfs(_DIRECTORY)
        outstanding = sum(max(0, nbytes - os.fstat(fd).st_blocks * 512) for fd, nbytes in self._promised.values())
        return max(0, min(room.f_bavail * room.f_frsize, ram.available()) - outstanding)

    def _no_room(self, nbytes: int, free: int) -> OutOfSharedMemory:
        return OutOfSharedMemory(
            f"{_DIRECTORY} has no room: {_size(nbytes)} needed, {_size(free)} free of {_size(self.total_nbytes())} "
            "(RAM counts too); unload a model, or enlarge it: mount -o remount,size=SIZE /dev/shm "
            "(docker: --shm-size SIZE)"
        )


def _path(name: str) -> Path:
    return _DIRECTORY / name.removeprefix("/")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


__all__ = ["PosixMapping", "PosixRung", "PosixSegment", "Region"]
