"""One process's memory as the kernel counts it: /proc/PID/smaps_rollup and status. Knows no host and no model.

PSS (proportional set size) counts a page that k processes map as 1/k in each, so a sum over all of them counts every
page once. The kernel looks at every page for that; what ``status`` says, it has at hand.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lunashm import process
from lunashm.usage import ProcessId, Unseen

PROC = Path("/proc")
_FIELD = re.compile(rb"^(\w+):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class Resident:
    """Bytes, all of them however many others map them: cheap. ``anonymous``: of no file."""

    anonymous: int
    file: int
    shared: int


@dataclass(frozen=True)
class Ram:
    """Bytes, resident ones only.

    pss         all, each page divided by the number of processes that map it
    pss_shared  the part of it that is shared memory (files in /dev/shm, memfd)
    private     what this process alone maps, shared memory apart: about what its end would give back
    shared      shared memory in full, however many others map it
    """

    pss: int
    pss_shared: int
    private: int
    shared: int


def parse_status(text: bytes) -> Resident | None:
    """None for a process that has ended: it has no memory."""
    found = _fields(text)
    try:
        return Resident(found[b"RssAnon"], found[b"RssFile"], found[b"RssShmem"])
    except KeyError:
        return None


def parse_rollup(text: bytes, shared: int) -> Ram | None:
    """``shared``: in full, as status has it. None for a process that has ended."""
    found = _fields(text)
    try:
        pss, pss_shared = found[b"Pss"], found[b"Pss_Shmem"]
        alone = found[b"Private_Clean"] + found[b"Private_Dirty"]
    except KeyError:
        return None
    # A process that is the only one to map a segment has it among its private pages; how much that is the kernel does
    # not say. The least it can be: whatever is not its alone counts at most half in PSS. And what it has beside shared
    # memory, it has in PSS beside shared memory. The first is exact with up to two processes, the second errs by less
    # than its part of libraries.
    alone_with = max(0, 2 * pss_shared - shared)
    return Ram(pss, pss_shared, max(0, min(alone - alone_with, pss - pss_shared)), shared)


def resident(who: ProcessId) -> Resident | Unseen:
    """What ``who`` has mapped, with every page in full."""
    text = _read(who, "status")
    found = text if isinstance(text, Unseen) else parse_status(text)
    return found or Unseen("ended just now")


def walked(who: ProcessId, shared: int) -> Ram | Unseen:
    """All of it. Costs the kernel some 20 ms for each GB that is mapped."""
    text = _read(who, "smaps_rollup")
    found = text if isinstance(text, Unseen) else parse_rollup(text, shared)
    return found or Unseen("it ended just now, or this kernel does not tell Pss_Shmem (Linux 5.3 does)")


def _read(who: ProcessId, name: str) -> bytes | Unseen:
    if who.pid_namespace != process.namespace():
        return Unseen("in another PID namespace")
    if who.start_ticks and process.start_ticks(who.pid) != who.start_ticks:
        return Unseen("ended just now")
    try:
        return (PROC / str(who.pid) / name).read_bytes()
    except PermissionError:
        return Unseen("another user's, or protected from being looked at")
    except (FileNotFoundError, ProcessLookupError):
        return Unseen("ended just now")
    except OSError as exc:
        return Unseen(f"/proc/PID/{name}: {exc.strerror}")


def _fields(text: bytes) -> dict[bytes, int]:
    return {name: int(kilobytes) * 1024 for name, kilobytes in _FIELD.findall(text)}
