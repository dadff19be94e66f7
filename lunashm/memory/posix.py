"""The ``posix`` rung: named shared memory in /dev/shm. Bytes outlive the host; read-only is enforced by the kernel.

Ownership is a shared flock on the segment's own file: the kernel drops it with the owner, so whether a segment is
an orphan never depends on pids, which containers that share /dev/shm would read differently.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import secrets

from pathlib import Path

import posix_ipc
from typing_extensions import Buffer

from lunashm.errors import OutOfSharedMemory, SegmentFrozen, SegmentGone, SegmentNotFrozen
from lunashm.protocol import Handle

_DIRECTORY = Path("/dev/shm")
_PREFIX = "lunashm-"
_NO_ROOM = {errno.ENOSPC, errno.ENOMEM, errno.EDQUOT}


class Region(mmap.mmap):
    """A PROT_READ mapping that can be weakly referenced.

    Never call close(): torch keeps a plain reference to the buffer's owner, not an export count, so closing would
    unmap memory under live tensors. Dropping the last reference unmaps it.
    """


class PosixSegment:
    """A segment this process owns. Written with pwrite, so a full /dev/shm is an error here, never a SIGBUS."""

    def __init__(self, name: str, nbytes: int, fd: int) -> None:
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
        if self._frozen:
            raise SegmentFrozen(f"segment {self._name} is frozen; its bytes never change again")
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > self._nbytes:
            raise ValueError(f"write of {len(view)} bytes at {offset} leaves segment {self._name} ({self._nbytes} bytes)")
        while view:
            try:
                written = os.pwrite(self._fd, view, offset)
            except OSError as exc:
                if exc.errno in _NO_ROOM:
                    raise _out_of_memory(self._nbytes) from exc
                raise
            view, offset = view[written:], offset + written

    def freeze(self) -> None:
        """Swap the writable descriptor for a read-only one and take write permission off the file (I1)."""
        if self._frozen:
            return
        os.fchmod(self._fd, 0o400)
        reader = os.open(_DIRECTORY / self._name.lstrip("/"), os.O_RDONLY | os.O_CLOEXEC)
        fcntl.flock(reader, fcntl.LOCK_SH)
        os.close(self._fd)
        self._fd = reader
        self._frozen = True

    def export(self) -> Handle:
        if not self._frozen:
            raise SegmentNotFrozen(f"segment {self._name} is still writable; freeze() it before exporting it")
        return Handle(rung=PosixRung.name, device="cpu", nbytes=self._nbytes, data=self._name.encode())

    def free(self) -> None:
        """Remove the name. Mappings that exist keep their bytes; nobody new can open it."""
        if self._fd < 0:
            return
        try:
            posix_ipc.unlink_shared_memory(self._name)
        except posix_ipc.ExistentialError:
            pass
        os.close(self._fd)
        self._fd = -1


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
    name = "posix"
    device = "cpu"

    def allocate(self, nbytes: int) -> PosixSegment:
        if nbytes <= 0:
            raise ValueError(f"a segment has at least one byte, not {nbytes}")
        if nbytes > self.free_nbytes():
            raise _out_of_memory(nbytes)
        while True:
            name = f"/{_PREFIX}{os.getuid()}-{secrets.token_hex(8)}"
            memory = posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=0o600)
            fd = memory.fd
            os.set_inheritable(fd, False)
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # a starting host took it for an orphan between the two calls above
                os.close(fd)
                continue
            if os.fstat(fd).st_nlink == 0:
                os.close(fd)
                continue
            os.ftruncate(fd, nbytes)
            return PosixSegment(name, nbytes, fd)

    def open(self, handle: Handle) -> PosixMapping:
        name = handle.data.decode()
        try:
            fd = posix_ipc.SharedMemory(name, read_only=True).fd
        except (posix_ipc.Error, OSError, ValueError) as exc:
            raise SegmentGone(f"shared memory {name} is gone (host stopped, or model unloaded); attach again") from exc
        try:
            size = os.fstat(fd).st_size
            if size != handle.nbytes:
                raise SegmentGone(f"shared memory {name} has {size} bytes, the host said {handle.nbytes}; attach again")
            return PosixMapping(handle, Region(fd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ))
        finally:
            os.close(fd)

    def free_nbytes(self) -> int:
        """Room in /dev/shm, or free RAM where that is less: tmpfs pages are RAM."""
        room = os.statvfs(_DIRECTORY)
        return min(room.f_bavail * room.f_frsize, _available_ram())

    def total_nbytes(self) -> int:
        room = os.statvfs(_DIRECTORY)
        return room.f_blocks * room.f_frsize

    def reclaim(self) -> list[str]:
        removed = []
        for path in sorted(_DIRECTORY.glob(f"{_PREFIX}{os.getuid()}-*")):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except OSError:
                continue  # freed by its owner meanwhile
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
                removed.append(path.name)
            except (BlockingIOError, FileNotFoundError):
                continue
            finally:
                os.close(fd)
        return removed


def _available_ram() -> int:
    with open("/proc/meminfo") as meminfo:
        for line in meminfo:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62


def _out_of_memory(nbytes: int) -> OutOfSharedMemory:
    rung = PosixRung()
    free, total = rung.free_nbytes(), rung.total_nbytes()
    return OutOfSharedMemory(
        f"{_DIRECTORY} has no room: {nbytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free of {total / 1e9:.2f} GB "
        "(RAM counts too); unload a model, or enlarge it: mount -o remount,size=SIZE /dev/shm "
        "(docker: --shm-size SIZE)"
    )
