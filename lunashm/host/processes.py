"""Watching client processes by pidfd, so that the kernel tells of a death at once. Linux only."""

from __future__ import annotations

import os

from lunashm.process import pidfd_of, start_ticks
from lunashm.protocol import ClientInfo


def watch(info: ClientInfo) -> int | None:
    """A pidfd that becomes readable when the client's process ends; None where the host cannot see that process.

    A pid from another PID namespace, or one that was reused meanwhile, names somebody else here.
    """
    fd = pidfd_of(info.pid, info.pid_namespace)
    if fd is None:
        return None
    if info.start_ticks == 0 or start_ticks(info.pid) != info.start_ticks:
        os.close(fd)
        return None
    return fd
