"""What is particular to POSIX shared memory; the rest is in the contract suite."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lunashm.errors import OutOfSharedMemory, SegmentGone, SettingsError, SharedMemoryError
from lunashm.memory import posix, ram, rung_for
from lunashm.memory.posix import PosixRung
from lunashm.protocol import Handle
from tests.conftest import SHM, orphans, segments


@pytest.fixture
def rung() -> PosixRung:
    return PosixRung()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    before = segments()
    yield
    assert not orphans(segments() - before)


def file_of(name: str) -> Path:
    return SHM / name.removeprefix("/")


def test_segment_is_a_file_that_only_its_user_may_read(rung: PosixRung) -> None:
    segment = rung.allocate(10)
    assert stat.S_IMODE(file_of(segment.name).stat().st_mode) == 0o600
    segment.freeze()
    assert stat.S_IMODE(file_of(segment.name).stat().st_mode) == 0o400
    segment.free()
    assert not file_of(segment.name).exists()


def test_owner_keeps_no_writable_descriptor_after_freeze(rung: PosixRung) -> None:
    segment = rung.allocate(10)
    segment.freeze()
    modes = []
    for fd in Path("/proc/self/fd").iterdir():
        if fd.exists() and str(fd.readlink()).startswith(str(file_of(segment.name))):
            modes.append(fcntl.fcntl(int(fd.name), fcntl.F_GETFL) & os.O_ACCMODE)
    assert modes == [os.O_RDONLY]
    segment.free()


def test_descriptors_do_not_reach_child_processes(rung: PosixRung) -> None:
    segment = rung.allocate(10)
    listing = ["ls", "-l", "/proc/self/fd"]
    seen = subprocess.run(listing, close_fds=False, capture_output=True, text=True, check=True).stdout
    assert segment.name not in seen
    segment.free()


def test_segments_and_mappings_give_all_descriptors_back(rung: PosixRung) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        segment = rung.allocate(10)
        segment.freeze()
        rung.open(segment.export())
        segment.free()
        with pytest.raises(SegmentGone):
            rung.open(Handle("posix", "cpu", 10, segment.name.encode()))
    assert len(os.listdir("/proc/self/fd")) == before


# -- no room -----------------------------------------------------------------------------------------------------------


def test_error_says_how_to_make_room(
    rung: PosixRung, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    before = segments()
    monkeypatch.setattr(posix, "shm_free", lambda: 50_000_000)
    with pytest.raises(OutOfSharedMemory, match=r"64\.0 MB needed, 50\.0 MB free of .*--shm-size.*--memory memfd"):
        rung.allocate(64_000_000)
    monkeypatch.setattr(ram, "available", lambda: 40_000_000)  # another kind of shared memory would not help
    with pytest.raises(OutOfSharedMemory, match=r"RAM has no room: 64\.0 MB needed, 40\.0 MB free; unload a model"):
        rung.allocate(64_000_000)
    assert orphans(segments() - before) == set()  # nothing was written, nothing is left


def test_tmpfs_that_fills_up_meanwhile_is_reported_as_such(
    rung: PosixRung, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = rung.allocate(100)

    def full(*arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OutOfSharedMemory, match="needed"):
        segment.write(0, b"a")
    segment.free()


@pytest.mark.parametrize("broken", ["ftruncate", "fchmod", "pwrite"])
def test_other_errors_of_the_kernel_become_ours_and_leave_nothing(
    rung: PosixRung, monkeypatch: pytest.MonkeyPatch, broken: str, nothing_left: None
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, broken, refuse)
    with pytest.raises(SharedMemoryError, match="Input/output error"):
        segment = rung.allocate(100)
        try:
            segment.write(0, b"a")
            segment.freeze()
        finally:
            segment.free()


def test_room_is_counted_until_it_is_written(rung: PosixRung, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "available", lambda: 1 << 20)
    segment = rung.allocate(1 << 19)
    assert rung.free_nbytes() == 1 << 19
    segment.write(0, bytes(1 << 18))
    assert rung.free_nbytes() == (1 << 20) - (1 << 18)  # ram.available() would have noticed the other quarter
    segment.freeze()
    assert rung.free_nbytes() == 1 << 20
    segment.free()


# -- orphans -----------------------------------------------------------------------------------------------------------

OWNER = """
import sys
from lunashm.memory.posix import PosixRung
segments = [PosixRung().allocate(10) for _ in range(2)]
segments[0].freeze()
print(*(segment.name for segment in segments), flush=True)
sys.stdin.read()
"""


def test_reclaim_removes_what_a_dead_process_left_and_nothing_of_a_live_one(rung: PosixRung) -> None:
    command = [sys.executable, "-c", OWNER]
    owners = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    names = [owner.stdout.readline().split() for owner in owners if owner.stdout is not None]
    owners[0].kill()
    owners[0].wait()
    removed = rung.reclaim()
    assert {name.removeprefix("/") for name in names[0]} <= set(removed)
    assert not any(file_of(name).exists() for name in names[0])
    assert all(file_of(name).exists() for name in names[1])
    owners[1].kill()
    owners[1].wait()
    rung.reclaim()
    assert not any(file_of(name).exists() for name in names[1])
    for owner in owners:
        owner.communicate()


def test_reclaim_leaves_files_of_others_alone(rung: PosixRung) -> None:
    stranger = SHM / f"lunashm-{os.getuid() + 1}-0123456789abcdef"
    stranger.touch()
    try:
        rung.reclaim()
        assert stranger.exists()
    finally:
        stranger.unlink()


def test_allocating_while_others_reclaim_never_loses_a_segment(rung: PosixRung) -> None:
    """A new segment is an orphan for the moment between its creation and its lock."""
    done = threading.Event()

    def reclaim() -> None:
        while not done.is_set():
            rung.reclaim()

    reclaimer = threading.Thread(target=reclaim)
    reclaimer.start()
    try:
        for _ in range(300):
            segment = rung.allocate(10)
            segment.freeze()
            rung.open(segment.export())
            segment.free()
    finally:
        done.set()
        reclaimer.join()


# -- choosing a rung ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "device"), [("posix", "GPU-1"), ("tape", "cpu"), ("cuda-vmm", "cpu")])
def test_rung_that_a_device_does_not_have_is_refused(name: str, device: str) -> None:
    with pytest.raises(SettingsError, match=f"no memory rung '{name}' on {device}; use one of"):
        rung_for(name, device)


def test_handle_of_an_unknown_rung_cannot_be_opened() -> None:
    from lunashm.memory import open_handle

    with pytest.raises(SegmentGone, match="cannot open"):
        open_handle(Handle("tape", "cpu", 10, b"x"))
