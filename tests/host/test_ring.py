"""Threads and buffers with work that is only numbers. A ring that waits for ever is stopped by the time limit."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lunashm.host.ring import Ring
from tests.waiting import DEADLINE_S

pytestmark = pytest.mark.timeout(60)

SHAPES = [(1, 1), (1, 4), (2, 1), (4, 2), (8, 8)]
"""Readers and buffers; more readers than buffers included."""

WORK = 12


class Broken(Exception):
    pass


def buffers(count: int) -> list[memoryview]:
    return [memoryview(bytearray(1)) for _ in range(count)]


def put(number: int, buffer: memoryview) -> None:
    buffer[0] = number


def no_reader_is_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("lunashm-reader")]


@pytest.mark.parametrize(("readers", "count"), SHAPES)
def test_all_work_is_taken_in_order_with_the_buffer_it_was_put_in(readers: int, count: int) -> None:
    taken = []
    Ring(range(200), buffers(count), readers, put).run(lambda n, buffer: taken.append((n, buffer[0])))
    assert taken == [(n, n) for n in range(200)]
    assert no_reader_is_left()


def test_no_work_is_no_trouble() -> None:
    Ring[int]([], buffers(2), 3, put).run(lambda n, buffer: pytest.fail("there is nothing to take"))
    assert no_reader_is_left()


def test_readers_work_at_the_same_time() -> None:
    together = threading.Barrier(3)

    def meet(number: int, buffer: memoryview) -> None:
        together.wait(DEADLINE_S)

    Ring(range(6), buffers(3), 3, meet).run(lambda n, buffer: None)


def test_later_work_that_is_ready_first_waits_for_its_turn() -> None:
    rest_is_done = threading.Event()
    taken = []

    def fill(number: int, buffer: memoryview) -> None:
        if number == 0:
            assert rest_is_done.wait(DEADLINE_S)
        if number == 3:
            rest_is_done.set()

    Ring(range(5), buffers(4), 2, fill).run(lambda n, buffer: taken.append(n))
    assert taken == list(range(5))


def test_oldest_missing_work_has_a_buffer_however_fast_the_others_are() -> None:
    """All other buffers are full and wait for it: it needs none of them."""
    others = threading.Semaphore(0)
    taken = []

    def fill(number: int, buffer: memoryview) -> None:
        if number == 0:
            for _ in range(3):
                assert others.acquire(timeout=DEADLINE_S)
        else:
            others.release()

    Ring(range(50), buffers(4), 8, fill).run(lambda n, buffer: taken.append(n))
    assert taken == list(range(50))


@pytest.mark.parametrize("at", range(WORK))
@pytest.mark.parametrize(("readers", "count"), SHAPES)
def test_error_of_a_reader_is_raised_and_nobody_is_left(readers: int, count: int, at: int) -> None:
    taken = []

    def fill(number: int, buffer: memoryview) -> None:
        if number == at:
            raise Broken(number)

    with pytest.raises(Broken, match=f"^{at}$"):
        Ring(range(WORK), buffers(count), readers, fill).run(lambda n, buffer: taken.append(n))
    assert taken == list(range(len(taken)))
    assert len(taken) <= at
    assert no_reader_is_left()


@pytest.mark.parametrize("at", range(WORK))
@pytest.mark.parametrize(("readers", "count"), SHAPES)
def test_error_of_the_taker_stops_the_readers(readers: int, count: int, at: int) -> None:
    filled = []

    def take(number: int, buffer: memoryview) -> None:
        if number == at:
            raise Broken(number)

    with pytest.raises(Broken):
        Ring(range(1000), buffers(count), readers, lambda n, buffer: filled.append(n)).run(take)
    assert max(filled) <= at + count
    assert no_reader_is_left()


def test_free_buffers_are_not_filled_any_more_once_the_taker_has_failed() -> None:
    filled = []

    def fill(number: int, buffer: memoryview) -> None:
        filled.append(number)
        if number == 1:
            assert ring._stopping.wait(DEADLINE_S)

    ring = Ring(range(1000), buffers(8), 1, fill)
    with pytest.raises(Broken):
        ring.run(fail_at_once)
    assert filled == [0, 1]


def fail_at_once(number: int, buffer: memoryview) -> None:
    raise Broken(number)


@pytest.mark.parametrize("at", range(WORK))
@pytest.mark.parametrize(("readers", "count"), SHAPES)
def test_error_of_the_work_itself_is_raised(readers: int, count: int, at: int) -> None:
    def work() -> Iterator[int]:
        yield from range(at)
        raise Broken(at)

    with pytest.raises(Broken):
        Ring(work(), buffers(count), readers, put).run(lambda n, buffer: None)
    assert no_reader_is_left()


def test_every_reader_may_fail_and_one_error_is_raised() -> None:
    together = threading.Barrier(4)

    def fill(number: int, buffer: memoryview) -> None:
        together.wait(DEADLINE_S)
        raise Broken(number)

    with pytest.raises(Broken):
        Ring(range(WORK), buffers(4), 4, fill).run(lambda n, buffer: None)
    assert no_reader_is_left()


def test_thread_that_cannot_be_started_leaves_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    start, begun = threading.Thread.start, []

    def start_two(thread: threading.Thread) -> None:
        if len(begun) == 2:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    ring = Ring(range(WORK), buffers(4), 3, put)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_two)
        with pytest.raises(RuntimeError, match="can't start"):
            ring.run(lambda n, buffer: None)
    assert len(begun) == 2
    assert no_reader_is_left()
