"""What every rung of memory promises (see lunashm/memory/__init__.py), its segments owned by one process and opened in
another. The fake of other tests is held to it, too; what becomes of handles, and of processes, is in the files beside.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from lunashm.errors import OutOfSharedMemory, SegmentFrozen, SegmentGone, SegmentNotFrozen
from tests.contracts.actor import STRIPE
from tests.contracts.remote import RemoteRung, RemoteSegment
from tests.contracts.rungs import Entry, only

MIB = 1 << 20


def test_segment_has_the_size_asked_for_and_a_name(rung: RemoteRung, segment: RemoteSegment) -> None:
    assert segment.nbytes == 1000
    assert segment.name
    assert not segment.frozen


def test_segments_have_distinct_names(rung: RemoteRung, segment: RemoteSegment) -> None:
    assert rung.allocate(1000).name != segment.name


# -- writing -----------------------------------------------------------------------------------------------------------


def test_what_was_written_is_what_is_mapped_and_the_rest_is_zero(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.write(10, b"abc")
    segment.write(990, b"0123456789")
    segment.write(500, b"")
    segment.freeze()
    assert rung.map(segment).all() == bytes(10) + b"abc" + bytes(977) + b"0123456789"


def test_memory_that_had_other_bytes_before_starts_as_zero(rung: RemoteRung) -> None:
    for _ in range(3):
        segment = rung.allocate(4 * MIB)
        segment.freeze()
        mapping = rung.map(segment)
        assert mapping.digest() == hashlib.sha256(bytes(4 * MIB)).hexdigest()
        mapping.drop()
        segment.free()
        dirty = rung.allocate(4 * MIB)
        dirty.fill(0xAB)
        dirty.free()


@pytest.mark.parametrize(("offset", "data"), [(-1, b"a"), (1000, b"a"), (998, b"abc"), (1 << 40, b"a")])
def test_write_outside_the_segment_is_an_error_and_changes_nothing(
    rung: RemoteRung, segment: RemoteSegment, offset: int, data: bytes
) -> None:
    with pytest.raises(ValueError):
        segment.write(offset, data)
    segment.freeze()
    assert rung.map(segment).all() == bytes(1000)


def test_four_threads_may_write_stretches_that_do_not_overlap(rung: RemoteRung) -> None:
    segment = rung.allocate(200 * STRIPE)
    segment.write_from_threads(4)
    segment.freeze()
    expected = b"".join(bytes([stripe]) * STRIPE for stripe in range(200))
    assert rung.map(segment).digest() == hashlib.sha256(expected).hexdigest()


def test_staging_buffer_has_the_size_asked_for_and_may_be_used_again_after_a_write(
    rung: RemoteRung, segment: RemoteSegment
) -> None:
    assert segment.write_staged(100, b"staged") == (6, False)
    segment.freeze()
    assert rung.map(segment).peek(99, 8) == b"\0staged\0"


def test_frozen_segment_cannot_be_written(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.freeze()
    segment.freeze()
    assert segment.frozen
    with pytest.raises(SegmentFrozen):
        segment.write(0, b"a")
    assert rung.map(segment).all() == bytes(1000)


# -- mapping -----------------------------------------------------------------------------------------------------------


def test_segment_is_exported_only_when_frozen(segment: RemoteSegment) -> None:
    with pytest.raises(SegmentNotFrozen):
        segment.export()


def test_handle_says_all_that_opening_needs(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.freeze()
    handle = segment.export()
    assert (handle.rung, handle.device, handle.nbytes) == (rung.name, rung.device, 1000)
    assert segment.export() == handle
    assert rung.map(segment).handle == handle


def test_segment_can_be_opened_many_times(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.write(0, b"shared")
    segment.freeze()
    mappings = [rung.map(segment) for _ in range(3)]
    assert mappings[0].drop()
    assert all(mapping.peek(0, 6) == b"shared" for mapping in mappings[1:])


def test_two_segments_have_bytes_of_their_own(rung: RemoteRung) -> None:
    segments = [rung.allocate(3 * MIB), rung.allocate(5 * MIB)]
    for byte, segment in enumerate(segments, start=1):
        segment.fill(byte)
        segment.freeze()
    mappings = [rung.map(segment) for segment in segments]
    segments[0].free()
    mappings[0].drop()
    assert mappings[1].digest() == hashlib.sha256(b"\2" * (5 * MIB)).hexdigest()


def test_peek_shows_a_stretch(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.write(998, b"yz")
    segment.freeze()
    mapping = rung.map(segment)
    assert mapping.peek(997, 3) == b"\0yz"
    assert mapping.peek(1000, 0) == mapping.peek(0, 0) == b""
    assert len(mapping.peek(0, 1000)) == 1000


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 1), (0, 1001), (999, 2), (1000, 1), (1001, 0), (5, -1)])
def test_peek_outside_the_segment_is_an_error(
    rung: RemoteRung, segment: RemoteSegment, offset: int, nbytes: int
) -> None:
    segment.freeze()
    mapping = rung.map(segment)
    with pytest.raises(ValueError):
        mapping.peek(offset, nbytes)


@only(lambda entry: not entry.on_gpu)
def test_mapping_in_ram_is_a_buffer_that_may_be_read(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.freeze()
    assert rung.map(segment).buffer_is_read_only()


def test_mapping_tells_of_its_end_once_and_not_before(
    rung: RemoteRung, segment: RemoteSegment, tmp_path: Path
) -> None:
    told = tmp_path / "told"
    segment.freeze()
    mapping = rung.map(segment)
    mapping.when_gone(told)
    held = mapping.hold()
    assert not mapping.drop()
    assert not told.exists()
    assert held.peek(0, 1) == b"\0"
    assert held.drop()
    assert told.read_text() == "gone\n"


def test_mapping_tells_everybody_who_asked(rung: RemoteRung, segment: RemoteSegment, tmp_path: Path) -> None:
    segment.freeze()
    mapping = rung.map(segment)
    for name in "ab":
        mapping.when_gone(tmp_path / name)
    mapping.drop()
    assert [(tmp_path / name).read_text() for name in "ab"] == ["gone\n", "gone\n"]


# -- freeing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [False, True])
def test_freed_segment_cannot_be_used(segment: RemoteSegment, freeze: bool) -> None:
    if freeze:
        segment.freeze()
    segment.free()
    segment.free()
    with pytest.raises(SegmentGone):
        segment.export()
    with pytest.raises(SegmentGone):
        segment.descriptor()
    with pytest.raises(SegmentGone):
        segment.write(0, b"a")


def test_handle_of_a_freed_segment_is_gone(rung: RemoteRung, segment: RemoteSegment) -> None:
    segment.freeze()
    handle = segment.export()
    segment.free()
    with pytest.raises(SegmentGone):
        rung.open(handle)


def test_mapping_follows_its_rungs_rule_when_the_segment_is_freed(
    entry: Entry, rung: RemoteRung, segment: RemoteSegment
) -> None:
    segment.write(0, b"still here")
    segment.freeze()
    mapping = rung.map(segment)
    segment.free()
    if entry.outlives_host:
        assert mapping.peek(0, 10) == b"still here"
    assert mapping.drop()


# -- room --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, -1])
def test_segment_has_at_least_one_byte(rung: RemoteRung, nbytes: int) -> None:
    with pytest.raises(ValueError):
        rung.allocate(nbytes)


def test_segment_that_does_not_fit_is_refused_with_the_sizes(rung: RemoteRung) -> None:
    with pytest.raises(OutOfSharedMemory, match=r"[\d.]+ [MG]B needed, [\d.]+ [MG]B free"):
        rung.allocate(rung.free_nbytes() + (1 << 40))
    rung.allocate(1000)


def test_room_that_a_segment_in_the_making_will_take_is_not_promised_twice(rung: RemoteRung) -> None:
    before = rung.free_nbytes()
    nbytes = 256 * MIB if before > 1 << 30 else before // 2
    segment = rung.allocate(nbytes)
    assert rung.free_nbytes() <= before - nbytes * 0.9  # other programs take and give meanwhile
    segment.free()
    assert rung.free_nbytes() >= before - nbytes * 0.5


def test_rung_knows_its_size(rung: RemoteRung) -> None:
    assert 0 < rung.free_nbytes() <= rung.total_nbytes()


def test_reclaim_leaves_what_is_alive(rung: RemoteRung, segment: RemoteSegment) -> None:
    rung.reclaim()
    segment.freeze()
    rung.reclaim()
    rung.map(segment)
