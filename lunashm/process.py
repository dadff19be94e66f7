"""Which process is which: a pid alone is not enough across namespaces and reuse."""

from __future__ import annotations

import os


def pidfd_of(pid: int, pid_namespace: int) -> int | None:
    """A descriptor that becomes readable when process ``pid`` ends; None where it is not visible as ``pid`` from here.

    The pid may have been reused: open first, then check that it still names who you mean, then trust the descriptor.
    """
    if pid <= 0 or pid_namespace == 0 or pid_namespace != namespace():
        return None
    try:
        return os.pidfd_open(pid)
    except (OSError, OverflowError, AttributeError):
        return None


_PF_EXITING = 0x4
"""include/linux/sched.h: set by a thread that ends, before it lets go of anything."""


def stat_of(pid: int) -> int | None:
    """A descriptor of /proc/PID/stat for :func:`is_exiting`; None if there is no such process. Raises OSError."""
    try:
        return os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None


def is_exiting(stat: int) -> bool:
    """Whether the process of :func:`stat_of`'s descriptor has begun to end, or is gone (flags, field 9)."""
    try:
        return bool(int(os.pread(stat, 4096, 0).rpartition(b")")[2].split()[6]) & _PF_EXITING)
    except ProcessLookupError:
        return True


def namespace(pid: int | str = "self") -> int:
    """The inode of a process's PID namespace; 0 where /proc does not say."""
    try:
        return os.stat(f"/proc/{pid}/ns/pid").st_ino
    except OSError:
        return 0


def is_own(pid: int) -> bool:
    """Whether ``pid`` is this process, and not the one that it was forked from."""
    return pid == os.getpid()


def start_ticks(pid: int | str = "self") -> int:
    """When a process started, in clock ticks since boot (field 22 of /proc/PID/stat); 0 if it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            return int(stat.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0
