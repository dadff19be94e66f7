"""How much memory a process and its descendants hold, as the kernel counts it (/proc/PID/smaps_rollup)."""

from __future__ import annotations

import contextlib
from pathlib import Path

from lunashm.usage.ram import Resident, parse_status

SHM = "/dev/shm/"


def descendants(pid: int) -> list[int]:
    """The process itself, then all its living descendants."""
    found = [pid]
    for parent in found:  # grows while it runs
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found += map(int, task.read_text().split())
    return found


def tree_memory(pid: int) -> dict[str, int]:
    """Bytes over a process and its descendants. Raises ProcessLookupError when the process itself is gone.

    rss      all resident pages, shared ones in full (and once for each process)
    pss      resident pages, each divided by the number of processes that map it
    private  pages that one process alone maps (USS): what its end would give back
    shared   pages that other processes map too, in full
    shmem    the part of pss that is shared memory and tmpfs
    """
    fields: dict[str, int] = {}
    for member in descendants(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError as exc:
            if member == pid:
                raise ProcessLookupError(f"process {pid} is gone") from exc
            continue  # a child that ended meanwhile
        for line in lines[1:]:
            name, kilobytes, *_ = line.split()
            fields[name] = fields.get(name, 0) + int(kilobytes) * 1024
    if not fields:
        raise ProcessLookupError(f"process {pid} has ended")
    return {
        "rss": fields["Rss:"],
        "pss": fields["Pss:"],
        "private": fields["Private_Clean:"] + fields["Private_Dirty:"],
        "shared": fields["Shared_Clean:"] + fields["Shared_Dirty:"],
        "shmem": fields.get("Pss_Shmem:", 0),
    }


def resident(pid: int) -> Resident:
    """Of a process and its descendants, every page in full; the kernel has it at hand, so it may be asked often.

    Raises ProcessLookupError when the process itself is gone.
    """
    found = []
    for member in descendants(pid):
        with contextlib.suppress(OSError):
            found.append(parse_status(Path(f"/proc/{member}/status").read_bytes()))
    there = [one for one in found if one is not None]
    if not there:
        raise ProcessLookupError(f"process {pid} is gone")
    return Resident(sum(r.anonymous for r in there), sum(r.file for r in there), sum(r.shared for r in there))


def held_shared_memory(pid: int) -> int:
    """Bytes of /dev/shm that a process keeps through open descriptors, removed files included, mapped or not."""
    held: dict[int, int] = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if str(entry.readlink()).startswith(SHM):
                found = entry.stat()  # follows to the open file itself, named or not
                held[found.st_ino] = found.st_blocks * 512
    return sum(held.values())
