"""What is particular to sealed anonymous files; the rest is in the contract suite."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lunashm.errors import OutOfSharedMemory, SegmentGone, SharedMemoryError
from lunashm.memory import ram
from lunashm.memory.memfd import FROZEN, MemfdRung, MemfdSegment
from tests.conftest import SHM


@pytest.fixture
def rung() -> MemfdRung:
    return MemfdRung()


@pytest.fixture
def segment(rung: MemfdRung) -> Iterator[MemfdSegment]:
    segment = rung.allocate(1000)
    yield segment
    segment.free()


@pytest.fixture
def nothing_left() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


def files_of(name: str) -> list[int]:
    """This process's descriptors of a segment."""
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        if fd.is_symlink() and name in str(fd.readlink()):
            found.append(int(fd.name))
    return found


# -- seals -------------------------------------------------------------------------------------------------------------


def test_frozen_segment_has_every_seal_and_an_open_one_has_none(segment: MemfdSegment) -> None:
    (writer,) = files_of(segment.name)
    assert fcntl.fcntl(writer, fcntl.F_GET_SEALS) & FROZEN == 0
    segment.freeze()
    seals = fcntl.fcntl(segment.descriptor(), fcntl.F_GET_SEALS)
    assert seals & FROZEN == FROZEN
    for seal in (fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL):
        assert seals & seal


def test_owner_keeps_only_a_read_only_descriptor_after_freeze(segment: MemfdSegment) -> None:
    (writer,) = files_of(segment.name)
    assert fcntl.fcntl(writer, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR
    segment.freeze()
    assert files_of(segment.name) == [segment.descriptor()]
    assert fcntl.fcntl(segment.descriptor(), fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_nobody_writes_or_resizes_a_frozen_segment_even_after_opening_it_anew(segment: MemfdSegment) -> None:
    """The file's mode would let its owner open it for writing; the seals hold all the same."""
    segment.freeze()
    again = os.open(f"/proc/self/fd/{segment.descriptor()}", os.O_RDWR | os.O_CLOEXEC)
    try:
        with pytest.raises(PermissionError):
            os.pwrite(again, b"a", 0)
        for size in (0, 999, 1001):
            with pytest.raises(PermissionError):
                os.ftruncate(again, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(again, fcntl.F_ADD_SEALS, 0)
        with pytest.raises(PermissionError):
            mmap.mmap(again, 1000, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(again)


def test_handed_over_descriptor_can_be_mapped_only_for_reading(segment: MemfdSegment) -> None:
    segment.write(0, b"abc")
    segment.freeze()
    handed_over = os.dup(segment.descriptor())
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(handed_over, 1000, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        with pytest.raises(OSError):
            os.pwrite(handed_over, b"a", 0)
        with mmap.mmap(handed_over, 1000, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ) as mapped:
            assert mapped[:3] == b"abc"
    finally:
        os.close(handed_over)


def test_segment_that_somebody_maps_for_writing_is_not_frozen(segment: MemfdSegment) -> None:
    """The kernel refuses the seal, so that nobody can go on writing through an old mapping."""
    (writer,) = files_of(segment.name)
    with mmap.mmap(writer, 1000, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE):
        before = files_of(segment.name)
        with pytest.raises(SharedMemoryError, match="busy"):
            segment.freeze()
        assert not segment.frozen
        assert files_of(segment.name) == before
    segment.freeze()


def test_freezing_that_failed_can_be_tried_again(segment: MemfdSegment, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:

        def refuse(*arguments: object) -> int:
            raise OSError(errno.EMFILE, "Too many open files")

        patch.setattr(os, "open", refuse)
        with pytest.raises(SharedMemoryError, match="Too many open files"):
            segment.freeze()
    segment.write(0, b"a")
    segment.freeze()
    assert segment.frozen


@pytest.mark.parametrize("missing", [fcntl.F_SEAL_WRITE, fcntl.F_SEAL_SHRINK, fcntl.F_SEAL_GROW, fcntl.F_SEAL_SEAL])
def test_descriptor_that_lacks_one_seal_is_refused(rung: MemfdRung, segment: MemfdSegment, missing: int) -> None:
    segment.freeze()
    fd = os.memfd_create("almost", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, 1000)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, FROZEN & ~missing)
        with pytest.raises(SegmentGone, match="not sealed"):
            rung.open(segment.export(), fd)
    finally:
        os.close(fd)


# -- no name -----------------------------------------------------------------------------------------------------------


def test_segment_has_no_name_in_dev_shm(rung: MemfdRung) -> None:
    segment = rung.allocate(1000)
    unique = segment.name.removeprefix("memfd:")
    assert not [path for path in SHM.iterdir() if unique in path.name]
    segment.free()


def test_memory_map_shows_whose_segment_it_is(rung: MemfdRung, segment: MemfdSegment) -> None:
    segment.freeze()
    mapping = rung.open(segment.export(), segment.descriptor())
    assert f"/memfd:lunashm-{segment.name}" in Path("/proc/self/maps").read_text()
    del mapping


def test_segment_is_never_executable(segment: MemfdSegment) -> None:
    """MFD_NOEXEC_SEAL, where the kernel has it: its mode has no x and cannot get one."""
    (writer,) = files_of(segment.name)
    if os.fstat(writer).st_mode & 0o111:
        pytest.skip("a kernel before 6.3")
    with pytest.raises(PermissionError):
        os.fchmod(writer, 0o755)


def test_kernel_without_noexec_seal_does_as_well(rung: MemfdRung, monkeypatch: pytest.MonkeyPatch) -> None:
    create = os.memfd_create
    tried = []

    def older(name: str, flags: int) -> int:
        tried.append(flags)
        if flags & 8:
            raise OSError(errno.EINVAL, "Invalid argument")
        return create(name, flags)

    monkeypatch.setattr(os, "memfd_create", older)
    segment = rung.allocate(1000)
    segment.write(0, b"abc")
    segment.freeze()
    assert bytes(rung.open(segment.export(), segment.descriptor())[:3]) == b"abc"
    assert len(tried) == 2
    segment.free()


# -- no room -----------------------------------------------------------------------------------------------------------


def test_error_says_what_is_missing(
    rung: MemfdRung, monkeypatch: pytest.MonkeyPatch, nothing_left: None
) -> None:
    monkeypatch.setattr(ram, "available", lambda: 50_000_000)
    with pytest.raises(OutOfSharedMemory, match=r"64\.0 MB needed, 50\.0 MB free of .*memory limit"):
        MemfdRung().allocate(64_000_000)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM])
@pytest.mark.parametrize("broken", ["memfd_create", "ftruncate", "pwrite"])
def test_memory_that_runs_out_is_reported_as_such(
    rung: MemfdRung, monkeypatch: pytest.MonkeyPatch, nothing_left: None, broken: str, number: int
) -> None:
    def full(*arguments: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, broken, full)
    with pytest.raises(OutOfSharedMemory, match="needed"):
        allocate_and_freeze(rung)


@pytest.mark.parametrize("broken", ["memfd_create", "ftruncate", "pwrite", "open"])
def test_other_errors_of_the_kernel_become_ours_and_leave_nothing(
    rung: MemfdRung, monkeypatch: pytest.MonkeyPatch, nothing_left: None, broken: str
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, broken, refuse)
    with pytest.raises(SharedMemoryError, match="Input/output error"):
        allocate_and_freeze(rung)


def allocate_and_freeze(rung: MemfdRung) -> None:
    segment = rung.allocate(100)
    try:
        segment.write(0, b"a")
        segment.freeze()
    finally:
        segment.free()


def test_room_is_counted_until_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ram, "available", lambda: 1 << 20)
    rung = MemfdRung()
    segment = rung.allocate(1 << 19)
    assert rung.free_nbytes() == 1 << 19
    segment.write(0, bytes(1 << 18))
    assert rung.free_nbytes() == (1 << 20) - (1 << 18)  # ram.available() would have noticed the other quarter
    segment.freeze()
    assert rung.free_nbytes() == 1 << 20
    segment.free()


def test_descriptor_of_another_segment_of_the_same_size_is_refused(rung: MemfdRung) -> None:
    """It would show another model's bytes under this one's names."""
    one, other = rung.allocate(100), rung.allocate(100)
    for segment in (one, other):
        segment.freeze()
    with pytest.raises(SegmentGone, match="is another segment's"):
        rung.open(one.export(), other.descriptor())
    for segment in (one, other):
        rung.open(segment.export(), segment.descriptor())
        segment.free()
