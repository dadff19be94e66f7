from __future__ import annotations

import pytest

from lunashm import protocol as p
from lunashm.host.board import PERIOD_S, Board, Snapshot
from lunashm.host.timings import Timings
from tests.fakes import FakeClock
from tests.messages import HOST, MODEL

STATUS = p.Status(HOST, 60.0, (MODEL,), 2, 3, 768, 512, 1 << 34, {"request.Attach": 3})


class Books:
    """``takes``: how many snapshots were made."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.takes = 0
        self.broken = False
        self.board = Board(self.take, self.clock)

    def take(self) -> Snapshot:
        self.takes += 1
        if self.broken:
            raise ValueError("broken books")
        return Snapshot(STATUS, Timings(), self.clock())


def test_there_is_a_snapshot_from_the_start() -> None:
    books = Books()
    assert books.board.latest.taken_at == books.clock()


def test_many_turns_in_one_period_make_one_snapshot_at_its_end() -> None:
    books = Books()
    first = books.board.latest
    for _ in range(1000):
        books.board.turn()
    assert (books.takes, books.board.latest) == (1, first)
    assert books.board.rest_ms == PERIOD_S * 1000, "the loop is woken for what it has not shown yet"
    books.clock.advance(books.board.rest_ms / 1000)
    assert books.board.rest_ms == 0
    books.board.turn()
    assert (books.takes, books.board.latest.taken_at) == (2, books.clock())


def test_loop_that_has_nothing_to_show_is_left_asleep() -> None:
    books = Books()
    assert books.board.rest_ms > 1e6
    books.clock.advance(10)
    books.board.turn()
    assert books.takes == 2
    assert books.board.rest_ms > 1e6


def test_snapshot_that_fails_leaves_the_last_one_and_is_not_tried_at_every_turn() -> None:
    books = Books()
    first = books.board.latest
    books.broken = True
    books.clock.advance(1)
    with pytest.raises(ValueError, match="broken books"):
        books.board.turn()
    for _ in range(10):
        books.board.turn()
    assert (books.takes, books.board.latest) == (2, first)
    books.broken = False
    books.clock.advance(1)
    books.board.turn()
    assert books.board.latest.taken_at == books.clock()
