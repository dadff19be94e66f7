"""Fail stop: whoever uses memory that dies with its host hears of the death before the memory can have gone."""

from __future__ import annotations

import os
import resource
import select
import signal

import msgspec
import pytest

from lunashm.client.watch import HostWatch
from lunashm.errors import HostLost, SharedMemoryError
from lunashm.paths import find_host
from lunashm.process import is_exiting, stat_of
from lunashm.protocol import HostInfo
from tests.host_process import HostProcess
from tests.waiting import until


def info_of(host: HostProcess) -> HostInfo:
    info = find_host(host.endpoint)
    assert info is not None
    return info


def test_live_host_is_not_lost(own_host: HostProcess) -> None:
    watch = HostWatch(own_host.endpoint, info_of(own_host))
    assert not watch.lost
    watch.check()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_host_that_ends_is_lost_for_ever(own_host: HostProcess, number: signal.Signals) -> None:
    watch = HostWatch(own_host.endpoint, info_of(own_host))
    own_host.process.send_signal(number)
    own_host.process.wait()
    with pytest.raises(HostLost, match=f"pid {own_host.pid}.*attach again"):
        watch.check()
    own_host.start()
    assert watch.lost


def test_host_is_lost_before_any_descriptor_of_it_is_closed(own_host: HostProcess) -> None:
    """Memory goes with descriptors, and these are closed before a pidfd becomes readable: that alone tells too late."""
    pidfd, stat = os.pidfd_open(own_host.pid), stat_of(own_host.pid)
    assert stat is not None
    own_host.process.send_signal(signal.SIGKILL)
    orders = set()
    while not select.select([pidfd], [], [], 0)[0]:
        lock_is_free = find_host(own_host.endpoint) is None
        orders.add((lock_is_free, is_exiting(stat)))
    os.close(pidfd)
    own_host.process.wait()
    assert (True, False) not in orders
    assert is_exiting(stat)
    os.close(stat)


def test_host_that_stops_is_lost_before_it_frees_anything(own_host: HostProcess) -> None:
    """A host withdraws its lock file first."""
    watch = HostWatch(own_host.endpoint, info_of(own_host))
    own_host.endpoint.lock_path.write_bytes(b"")
    assert watch.lost


def test_host_that_another_one_replaced_is_lost(own_host: HostProcess) -> None:
    info = info_of(own_host)
    with pytest.raises(HostLost):
        HostWatch(own_host.endpoint, msgspec.structs.replace(info, host_id="another"))


def test_host_in_another_pid_namespace_cannot_be_watched(own_host: HostProcess) -> None:
    info = info_of(own_host)
    with pytest.raises(SharedMemoryError, match=r"cannot be watched.*--pid=host.*cuda-vmm"):
        HostWatch(own_host.endpoint, msgspec.structs.replace(info, pid_namespace=info.pid_namespace + 1))


def test_revoked_watch_says_why(own_host: HostProcess) -> None:
    watch = HostWatch(own_host.endpoint, info_of(own_host))
    watch.revoke("was left by this process")
    with pytest.raises(HostLost, match="was left by this process"):
        watch.check()


def test_watches_leave_no_descriptor(own_host: HostProcess) -> None:
    info = info_of(own_host)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        HostWatch(own_host.endpoint, info).check()
    until(lambda: len(os.listdir("/proc/self/fd")) == before, "descriptors are closed")


def test_process_without_a_descriptor_left_does_not_take_its_host_for_dead(own_host: HostProcess) -> None:
    watch = HostWatch(own_host.endpoint, info_of(own_host))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        lost = watch.lost
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not lost
