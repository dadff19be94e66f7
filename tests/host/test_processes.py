from __future__ import annotations

import os

import msgspec

from lunashm.host.processes import watch
from lunashm.process import namespace, start_ticks
from lunashm.protocol import ClientInfo

ME = ClientInfo(os.getpid(), namespace(), start_ticks(), "python", "", "0")


def changed(**fields: int) -> ClientInfo:
    return msgspec.structs.replace(ME, **fields)


def test_process_of_the_same_namespace_and_start_is_watched() -> None:
    fd = watch(ME)
    assert fd is not None
    os.close(fd)


def test_process_that_cannot_be_told_for_sure_is_not_watched() -> None:
    before = len(os.listdir("/proc/self/fd"))
    assert watch(changed(pid_namespace=ME.pid_namespace + 1)) is None  # a container's own count of pids
    assert watch(changed(pid_namespace=0)) is None
    assert watch(changed(start_ticks=ME.start_ticks + 1)) is None  # its pid was reused
    assert watch(changed(start_ticks=0)) is None
    assert watch(changed(pid=1 << 22 | 1)) is None
    assert watch(changed(pid=0)) is None
    assert len(os.listdir("/proc/self/fd")) == before
