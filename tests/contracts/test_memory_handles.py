"""What every rung promises of handles and descriptors that are not what they should be: an error, never other bytes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import msgspec
import pytest

from lunashm.errors import SegmentGone, SegmentNotFrozen, SharedMemoryError
from tests.contracts.actors import ActorProcess
from tests.contracts.remote import RemoteRung, RemoteSegment
from tests.contracts.rungs import Entry, in_processes, only

with_descriptors = only(lambda entry: entry.descriptors)

MIB = 1 << 20


# -- handles -----------------------------------------------------------------------------------------------------------


def test_handle_of_another_size_is_not_opened(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.freeze()
    handle = segment.export()
    for nbytes in (0, -1, 999, 1001, 1 << 40):
        with pytest.raises(SegmentGone):
            rung.open(msgspec.structs.replace(handle, nbytes=nbytes), segment.descriptor())


@pytest.mark.parametrize("data", [b"", b"/", b"\xff\xfe", b"/lunashm\0x", b"/../../etc/passwd", b"nothing-of-the-kind"])
def test_handle_that_names_no_segment_is_gone(rung: RemoteRung, segment: RemoteSegment, data: bytes) -> None:
    segment.freeze()
    with pytest.raises(SegmentGone):
        rung.open(msgspec.structs.replace(segment.export(), data=data), segment.descriptor())


def test_handle_that_travelled_is_the_same(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.freeze()
    handle = segment.export()
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(handle), type=type(handle))
    assert travelled == handle
    assert rung.open(travelled, segment.descriptor()).handle == handle


@in_processes
def test_stale_handle_opens_nothing_while_somebody_else_still_has_it_mapped(
    rung: RemoteRung, segment: RemoteSegment, second: RemoteRung
) -> None:
    segment.write(0, b"old")
    segment.freeze()
    handle = segment.export()
    mapping = rung.map(segment)
    segment.free()
    newer = rung.allocate(1000)
    newer.write(0, b"new")
    newer.freeze()
    with pytest.raises(SegmentGone):
        second.open(handle)
    assert mapping.drop()


@with_descriptors
def test_stale_handle_whose_descriptor_was_kept_shows_the_old_bytes_or_nothing(
    rung: RemoteRung, segment: RemoteSegment
) -> None:
    segment.write(0, b"old")
    segment.freeze()
    handle, descriptor = segment.export(), segment.descriptor()
    segment.free()
    newer = rung.allocate(1000)
    newer.write(0, b"new")
    newer.freeze()
    with contextlib.suppress(SegmentGone):
        assert rung.open(handle, descriptor).peek(0, 3) == b"old"


# -- descriptors -------------------------------------------------------------------------------------------------------


def test_descriptor_is_there_only_where_the_handle_is_not_enough(entry: Entry, segment: RemoteSegment) -> None:
    with pytest.raises(SegmentNotFrozen):
        segment.descriptor()
    segment.freeze()
    assert (segment.descriptor() is not None) == entry.descriptors
    segment.free()
    with pytest.raises(SegmentGone):
        segment.descriptor()


@with_descriptors
def test_descriptor_does_not_reach_children_and_works_as_a_duplicate(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.write(0, b"mine")
    segment.freeze()
    assert segment.inheritable() is False
    descriptor = segment.descriptor()
    assert descriptor is not None
    duplicate = os.dup(descriptor)  # the opener gets a duplicate of this one
    os.close(os.dup(descriptor))
    try:
        mappings = [rung.open(segment.export(), duplicate) for _ in range(2)]
    finally:
        os.close(duplicate)
    assert [mapping.peek(0, 4) for mapping in mappings] == [b"mine", b"mine"]
    assert rung.map(segment).peek(0, 4) == b"mine"


@with_descriptors
def test_handle_alone_opens_nothing(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.freeze()
    with pytest.raises(SegmentGone):
        rung.open(segment.export())


@contextlib.contextmanager
def foreign(kind: str) -> Iterator[int]:
    """A descriptor that is no segment's."""
    with contextlib.ExitStack() as stack:
        if kind == "null":
            ends = [os.open("/dev/null", os.O_RDWR)]
        elif kind == "pipe":
            ends = list(os.pipe())
        else:
            ends = [os.memfd_create("foreign", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
            os.ftruncate(ends[0], 1000)
        for end in ends:
            stack.callback(os.close, end)
        yield ends[0]


@with_descriptors
@pytest.mark.parametrize("kind", ["null", "pipe", "unsealed memfd"])
def test_descriptor_of_something_else_is_refused_and_given_back(
    rung: RemoteRung, segment: RemoteSegment, opener: ActorProcess, kind: str
) -> None:
    segment.freeze()
    handle = segment.export()
    rung.map(segment).drop()
    before = opener.call("counts")
    for _ in range(3):
        with foreign(kind) as descriptor, pytest.raises(SharedMemoryError):
            rung.open(handle, descriptor)
    assert opener.call("counts") == before
    assert rung.map(segment).all() == bytes(1000)


@with_descriptors
def test_descriptor_of_a_smaller_segment_is_refused(rung: RemoteRung, segment: RemoteSegment) -> None:
    """Of one of the same size cuda-vmm cannot tell: descriptors are matched to handles by whoever sends them."""
    larger = rung.allocate(64 * MIB)
    for each in (segment, larger):
        each.freeze()
    with pytest.raises(SharedMemoryError):
        rung.open(larger.export(), segment.descriptor())
    assert rung.map(larger).peek(64 * MIB - 1, 1) == b"\0"


@with_descriptors
def test_descriptor_that_is_closed_is_refused(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.freeze()
    with pytest.raises(SharedMemoryError):
        rung.open_with_number(segment.export(), 10_000)
    assert rung.map(segment).all() == bytes(1000)


@in_processes
def test_children_of_owner_and_opener_inherit_nothing(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.freeze()
    rung.map(segment)
    before = [actor.call("seen_by_a_child") for actor in (rung.owner, rung.opener)]
    writable, frozen = rung.allocate(1000), rung.allocate(1000)
    frozen.freeze()
    rung.map(frozen)
    assert writable.name
    assert [actor.call("seen_by_a_child") for actor in (rung.owner, rung.opener)] == before
    assert not any("lunashm" in file or "memfd" in file for files in before for file in files)


# -- no descriptor is free ---------------------------------------------------------------------------------------------


@in_processes
def test_owner_without_a_free_descriptor_can_go_on_later(rung: RemoteRung) -> None:
    rung.allocate(1000).free()
    before = rung.owner.call("counts")
    _either_works_or_says_why(lambda: rung.allocate(1000, starved=True).free())
    segment = rung.allocate(1000)
    segment.write(0, b"later")
    _either_works_or_says_why(lambda: segment.freeze(starved=True))
    segment.freeze()
    mapping = rung.map(segment)
    assert mapping.peek(0, 5) == b"later"
    segment.free()
    assert rung.owner.call("counts") == before


@in_processes
def test_opener_without_a_free_descriptor_can_go_on_later(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.write(0, b"later")
    segment.freeze()
    rung.map(segment).drop()
    before = rung.opener.call("counts")
    _either_works_or_says_why(lambda: rung.map(segment, starved=True).drop())
    mapping = rung.map(segment)
    assert mapping.peek(0, 5) == b"later"
    mapping.drop()
    assert rung.opener.call("counts") == before


@only(lambda entry: entry.rung in ("posix", "memfd"))
def test_files_need_a_descriptor_for_each_of_these_steps(rung: RemoteRung, segment: RemoteSegment) -> None:
    """So the two tests above are about something."""
    with pytest.raises(SharedMemoryError, match=r"creating segment .* failed: .* files"):
        rung.allocate(1000, starved=True)
    with pytest.raises(SharedMemoryError, match=r"freezing segment .* failed: .* files"):
        segment.freeze(starved=True)
    segment.freeze()
    with pytest.raises(SharedMemoryError, match=r"(mapping|opening) .* failed: .* files"):
        rung.map(segment, starved=True)


def _either_works_or_says_why(step: Callable[[], object]) -> None:
    """A driver may need no descriptor for it."""
    with contextlib.suppress(SharedMemoryError):
        step()
