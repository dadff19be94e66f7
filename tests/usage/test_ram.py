from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lunashm.process import namespace, start_ticks
from lunashm.usage import ProcessId, Unseen, ram
from lunashm.usage.ram import Ram, Resident
from tests.host_process import ROOT

ROLLUP = b"""563462847000-7ffff0ef3000 ---p 00000000 00:00 0                          [rollup]
Rss:                5000 kB
Pss:                %d kB
Pss_Anon:           1000 kB
Pss_Shmem:          %d kB
Private_Clean:        72 kB
Private_Dirty:      %d kB
SwapPss:               9 kB
"""
STATUS = b"Name:\tpython\nRssAnon:\t    1000 kB\nRssFile:\t     900 kB\nRssShmem:\t    4000 kB\nThreads:\t3\n"


def me() -> ProcessId:
    return ProcessId(os.getpid(), namespace(), start_ticks())


def test_figures_are_the_kernels_in_bytes() -> None:
    assert ram.parse_status(STATUS) == Resident(1000 << 10, 900 << 10, 4000 << 10)
    assert ram.parse_rollup(ROLLUP % (2344, 10, 1028), 1 << 20) == Ram(2344 << 10, 10 << 10, 1100 << 10, 1 << 20)


@pytest.mark.parametrize(
    ("pss_shared", "alone"),
    [(4000, 4000), (2000, 0), (1000, 0), (3000, 2000)],
    ids=["alone", "two", "four", "half with another"],
)
def test_segment_that_one_process_alone_maps_is_not_its_private_memory(pss_shared: int, alone: int) -> None:
    """4000 kB shared in full, 1100 kB private, and 700 kB as its part of libraries."""
    found = ram.parse_rollup(ROLLUP % (pss_shared + 1800, pss_shared, 1028 + alone), 4000 << 10)
    assert found == Ram((pss_shared + 1800) << 10, pss_shared << 10, 1100 << 10, 4000 << 10)


def test_segment_beside_one_that_many_map_is_at_most_hidden_behind_libraries() -> None:
    found = ram.parse_rollup(ROLLUP % (2500 + 1800, 2500, 1028 + 2000), 4000 << 10)
    assert found is not None
    assert 1100 << 10 <= found.private <= 1800 << 10


def test_figures_that_were_not_taken_at_one_moment_are_not_negative() -> None:
    found = ram.parse_rollup(ROLLUP % (4100, 4000, 1028), 3000 << 10)
    assert found is not None
    assert found.private >= 0


def test_process_without_memory_has_no_figures() -> None:
    assert ram.parse_status(b"Name:\tpython\nState:\tZ (zombie)\n") is None
    assert ram.parse_rollup(b"", 0) is None


def test_this_process_is_seen() -> None:
    resident, walked = ram.resident(me()), ram.walked(me(), 5)
    assert isinstance(resident, Resident)
    assert isinstance(walked, Ram)
    assert 0 < walked.private <= walked.pss - walked.pss_shared
    assert walked.shared == 5


def test_pid_that_means_another_process_is_not_looked_at() -> None:
    assert ram.walked(ProcessId(os.getpid(), namespace() + 1), 0) == Unseen("in another PID namespace")
    assert ram.walked(ProcessId(os.getpid(), namespace(), 1), 0) == Unseen("ended just now")


def test_process_that_ended_is_unseen() -> None:
    child = subprocess.Popen(["sleep", "600"])
    who = ProcessId(child.pid, namespace(), start_ticks(child.pid))
    assert isinstance(ram.resident(who), Resident)
    child.kill()
    child.wait()
    assert ram.resident(who) == ram.walked(who, 0) == Unseen("ended just now")


def test_zombie_is_unseen() -> None:
    child = subprocess.Popen(["sleep", "600"])
    who = ProcessId(child.pid, namespace(), start_ticks(child.pid))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert isinstance(ram.resident(who), Unseen)
    assert isinstance(ram.walked(who, 0), Unseen)
    child.wait()


@pytest.mark.skipif(0 < os.getuid() == Path("/proc/1").stat().st_uid, reason="process 1 is this user's")
def test_another_users_process_is_unseen_with_that_reason() -> None:
    code = """
import os, sys
from lunashm.process import namespace
from lunashm.usage import ProcessId, ram
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
print(ram.walked(ProcessId(1, namespace()), 0).reason)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "another user's, or protected from being looked at\n"
