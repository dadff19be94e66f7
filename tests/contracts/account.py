"""Whether memory was taken, and given back, whatever other programs do with theirs meanwhile."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol

from tests.contracts.remote import RemoteRung
from tests.waiting import until

MIB = 1 << 20

_SEGMENT = re.compile(r" ([0-9a-f]+:[0-9a-f]+ \d+) +(/dev/shm/|/memfd:)")
_SHM = Path("/dev/shm")


class Account(Protocol):
    """Opened before a segment of ``nbytes`` is allocated and mapped."""

    nbytes: int

    def check_taken(self) -> None: ...

    def check_given_back(self) -> None: ...


class FileAccount:
    """Memory that is a file in RAM, the stand-in's too: it is taken while a process has it open or mapped, or it has a
    name. ``pid``: who maps it."""

    nbytes = 5 * MIB

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._before = _mapped(pid)
        self._files: set[str] = set()

    def check_taken(self) -> None:
        self._files = _mapped(self._pid) - self._before
        assert self._files
        assert self._pid in self._holders()

    def check_given_back(self) -> None:
        until(lambda: not self._holders(), f"nobody holds {self._files}")

    def _holders(self) -> set[int]:
        """Processes; 0 is the file system."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        holders = {pid for pid in pids if self._files & (_mapped(pid) | _opened(pid))}
        return holders | ({0} if self._files & {_key(path) for path in _SHM.iterdir()} else set())


class DeviceAccount:
    """Memory of a real GPU, which this run has for itself, more or less."""

    nbytes = 256 * MIB

    def __init__(self, rung: RemoteRung) -> None:
        self._rung = rung
        self._before = rung.free_nbytes()

    def check_taken(self) -> None:
        until(lambda: self._rung.free_nbytes() < self._before - self.nbytes // 2, "the memory is taken")

    def check_given_back(self) -> None:
        until(lambda: self._rung.free_nbytes() > self._before - self.nbytes // 2, "the memory is given back")


def account(rung: RemoteRung, pid: int) -> Account:
    """``rung``: one whose owner stays."""
    on_real_gpu = rung.entry.on_gpu and not rung.entry.standin
    return DeviceAccount(rung) if on_real_gpu else FileAccount(pid)


def _mapped(pid: int) -> set[str]:
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except OSError:  # ended, or somebody else's
        return set()
    return {found[1] for found in _SEGMENT.finditer(maps)}


def _opened(pid: int) -> set[str]:
    try:
        return {_key(path) for path in Path(f"/proc/{pid}/fd").iterdir()}
    except OSError:
        return set()


def _key(path: Path) -> str:
    """As the memory map has it: device and inode."""
    try:
        status = path.stat()
    except OSError:  # closed, or removed
        return ""
    return f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x} {status.st_ino}"
