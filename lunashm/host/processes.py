"""Watching client processes by pidfd, so that the kernel tells of a death at once. Linux only."""

from __future__ import annotations

import os

from lunashm.process import namespace, start_ticks
from lunashm.protocol import ClientInfo


def watch(info: ClientInfo) -> int | None:
    """A pidfd that becomes readable when the client's process ends; None where the host cannot see that process.

    A pid from another PID namespace, or one that was reused meanwhile, names somebody else here.
    """
    if info.pid_namespace != namespace():
        return None
    try:
        fd = os.pidfd_open(info.pid)
    except (OSError, AttributeError):
        return None
    if start_ticks(info.pid) != info.start_ticks:
        os.close(fd)
        return None
    return fd
