from __future__ import annotations

import os
import select
import subprocess
import sys

from lunashm.process import namespace, pidfd_of, start_ticks


def test_namespace_and_start_identify_this_process() -> None:
    assert namespace() == os.stat("/proc/self/ns/pid").st_ino
    assert start_ticks() == start_ticks(os.getpid()) > 0


def test_process_that_is_gone_has_neither() -> None:
    assert namespace(1 << 22 | 1) == 0
    assert start_ticks(1 << 22 | 1) == 0


def test_pidfd_tells_of_the_end_of_a_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    fd = pidfd_of(child.pid, namespace())
    assert fd is not None
    assert select.select([fd], [], [], 0)[0] == []
    child.communicate(b"\n")
    assert select.select([fd], [], [], 0)[0] == [fd]
    os.close(fd)


def test_pid_of_another_or_an_unknown_namespace_is_nobody() -> None:
    assert pidfd_of(os.getpid(), namespace() + 1) is None
    assert pidfd_of(os.getpid(), 0) is None


def test_pid_that_no_process_can_have_is_nobody() -> None:
    for pid in (0, -1, 1 << 22 | 1, 1 << 40):
        assert pidfd_of(pid, namespace()) is None
