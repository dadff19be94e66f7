"""What every rung of memory promises (see lunashm/memory/__init__.py). The fake of other tests is held to it, too."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import msgspec
import pytest

from lunashm.errors import OutOfSharedMemory, SegmentFrozen, SegmentGone, SegmentNotFrozen
from lunashm.memory import Rung, Segment
from lunashm.memory.posix import PosixRung
from tests.fakes import HeapRung

RUNGS = {"posix": PosixRung, "fake": HeapRung}


@pytest.fixture(params=RUNGS)
def rung(request: pytest.FixtureRequest) -> Rung:
    return RUNGS[request.param]()


@pytest.fixture
def segment(rung: Rung) -> Iterator[Segment]:
    segment = rung.allocate(1000)
    yield segment
    segment.free()


def test_segment_has_the_size_asked_for_and_a_name(rung: Rung, segment: Segment) -> None:
    assert segment.nbytes == 1000
    assert segment.name
    assert not segment.frozen


def test_segments_have_distinct_names(rung: Rung, segment: Segment) -> None:
    other = rung.allocate(1000)
    assert other.name != segment.name
    other.free()


def test_what_was_written_is_what_is_mapped_and_the_rest_is_zero(rung: Rung, segment: Segment) -> None:
    segment.write(10, b"abc")
    segment.write(990, memoryview(bytearray(b"0123456789")))
    segment.write(500, b"")
    segment.freeze()
    mapped = bytes(memoryview(rung.open(segment.export())))
    assert mapped == bytes(10) + b"abc" + bytes(977) + b"0123456789"


@pytest.mark.parametrize(("offset", "data"), [(-1, b"a"), (1000, b"a"), (998, b"abc")])
def test_write_outside_the_segment_is_an_error_and_changes_nothing(
    rung: Rung, segment: Segment, offset: int, data: bytes
) -> None:
    with pytest.raises(ValueError):
        segment.write(offset, data)
    segment.freeze()
    assert bytes(memoryview(rung.open(segment.export()))) == bytes(1000)


def test_frozen_segment_cannot_be_written(segment: Segment) -> None:
    segment.freeze()
    segment.freeze()
    assert segment.frozen
    with pytest.raises(SegmentFrozen):
        segment.write(0, b"a")


def test_segment_is_exported_only_when_frozen(segment: Segment) -> None:
    with pytest.raises(SegmentNotFrozen):
        segment.export()


def test_handle_says_all_that_opening_needs(rung: Rung, segment: Segment) -> None:
    segment.freeze()
    handle = segment.export()
    assert (handle.rung, handle.device, handle.nbytes) == (rung.name, rung.device, 1000)
    assert segment.export() == handle
    travelled = msgspec.msgpack.decode(msgspec.msgpack.encode(handle), type=type(handle))
    assert rung.open(travelled).handle == handle


def test_segment_can_be_opened_many_times(rung: Rung, segment: Segment) -> None:
    segment.write(0, b"shared")
    segment.freeze()
    mappings = [rung.open(segment.export()) for _ in range(3)]
    assert all(bytes(memoryview(m)[:6]) == b"shared" for m in mappings)


def test_mapping_is_read_only(rung: Rung, segment: Segment) -> None:
    segment.freeze()
    view = memoryview(rung.open(segment.export()))
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 1


def test_buffer_tells_of_its_end(rung: Rung, segment: Segment) -> None:
    segment.freeze()
    buffer = rung.open(segment.export())
    gone = weakref.ref(buffer)
    del buffer
    gc.collect()
    assert gone() is None


def test_freed_segment_can_be_neither_used_nor_opened(rung: Rung, segment: Segment) -> None:
    segment.freeze()
    handle = segment.export()
    segment.free()
    segment.free()
    with pytest.raises(SegmentGone):
        rung.open(handle)
    with pytest.raises(SegmentGone):
        segment.export()
    with pytest.raises(SegmentGone):
        segment.write(0, b"a")


def test_mapping_outlives_the_segment(rung: Rung, segment: Segment) -> None:
    """True of the rungs there are; one whose memory dies with its owner will be an exception here."""
    segment.write(0, b"still here")
    segment.freeze()
    mapping = rung.open(segment.export())
    segment.free()
    assert bytes(memoryview(mapping)[:10]) == b"still here"


def test_handle_of_another_size_is_not_opened(rung: Rung, segment: Segment) -> None:
    segment.freeze()
    handle = segment.export()
    for nbytes in (0, 999, 1001):
        with pytest.raises(SegmentGone):
            rung.open(msgspec.structs.replace(handle, nbytes=nbytes))


@pytest.mark.parametrize("data", [b"", b"/", b"\xff\xfe", b"/lunashm\0x", b"/../../etc/passwd", b"nothing-of-the-kind"])
def test_handle_that_names_no_segment_is_gone(rung: Rung, segment: Segment, data: bytes) -> None:
    segment.freeze()
    with pytest.raises(SegmentGone):
        rung.open(msgspec.structs.replace(segment.export(), data=data))


@pytest.mark.parametrize("nbytes", [0, -1])
def test_segment_has_at_least_one_byte(rung: Rung, nbytes: int) -> None:
    with pytest.raises(ValueError):
        rung.allocate(nbytes)


def test_segment_that_does_not_fit_is_refused_with_the_sizes(rung: Rung) -> None:
    with pytest.raises(OutOfSharedMemory, match=r"[\d.]+ [MG]B needed, [\d.]+ [MG]B free"):
        rung.allocate(rung.free_nbytes() + (1 << 40))


def test_room_that_a_segment_in_the_making_will_take_is_not_promised_twice(rung: Rung) -> None:
    nbytes = 256 << 20 if rung.free_nbytes() > 1 << 30 else rung.free_nbytes() // 2
    before = rung.free_nbytes()
    segment = rung.allocate(nbytes)
    assert rung.free_nbytes() <= before - nbytes * 0.9  # other programs take and give meanwhile
    segment.free()
    assert rung.free_nbytes() >= before - nbytes * 0.5


def test_reclaim_leaves_what_is_alive(rung: Rung, segment: Segment) -> None:
    rung.reclaim()
    segment.freeze()
    rung.reclaim()
    rung.open(segment.export())


def test_rung_knows_its_size(rung: Rung) -> None:
    assert 0 < rung.free_nbytes() <= rung.total_nbytes()
