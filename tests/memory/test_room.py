from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from lunashm.memory.room import Room

PAGE = 4096


class Files:
    """Anonymous files, all closed at the end."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def new(self, written: int = 0) -> int:
        fd = os.memfd_create("room")
        os.pwrite(fd, bytes(written), 0)
        self.made.append(fd)
        return fd


@pytest.fixture
def files() -> Iterator[Files]:
    files = Files()
    yield files
    for fd in files.made:
        os.close(fd)


def test_room_without_promises_is_what_the_kernel_says() -> None:
    free = [100]
    room = Room(lambda: free[0])
    assert room.free() == 100
    free[0] = 70
    assert room.free() == 70


def test_promised_bytes_are_not_promised_again(files: Files) -> None:
    room = Room(lambda: 10 * PAGE)
    assert room.promise("a", files.new(), 6 * PAGE) is None
    assert room.free() == 4 * PAGE
    assert room.promise("b", files.new(), 5 * PAGE) == 4 * PAGE
    assert room.free() == 4 * PAGE  # what was refused takes nothing
    assert room.promise("b", files.new(), 4 * PAGE) is None
    assert room.free() == 0


def test_bytes_that_were_written_are_the_kernels_business(files: Files) -> None:
    room = Room(lambda: 10 * PAGE)
    file = files.new()
    room.promise("a", file, 6 * PAGE)
    os.pwrite(file, bytes(2 * PAGE), 0)
    assert room.free() == 6 * PAGE
    os.pwrite(file, bytes(PAGE), 0)  # the same page again
    assert room.free() == 6 * PAGE


def test_file_that_grows_past_its_promise_gives_nothing_back(files: Files) -> None:
    room = Room(lambda: 10 * PAGE)
    room.promise("a", files.new(written=3 * PAGE), PAGE)
    assert room.free() == 10 * PAGE


def test_settled_file_is_not_looked_at_again(files: Files) -> None:
    room = Room(lambda: 10 * PAGE)
    file = files.new()
    room.promise("a", file, 6 * PAGE)
    room.settle("a")
    room.settle("a")
    room.settle("nobody")
    os.close(files.made.pop())
    assert room.free() == 10 * PAGE


def test_room_that_shrank_below_the_promises_is_empty_not_negative(files: Files) -> None:
    free = [10 * PAGE]
    room = Room(lambda: free[0])
    room.promise("a", files.new(), 6 * PAGE)
    free[0] = PAGE
    assert room.free() == 0
    assert room.promise("b", files.new(), 1) == 0


def test_two_at_once_are_never_both_promised_the_last_bytes(files: Files) -> None:
    """The limit is read with the lock held: however long that takes, the second waits for the first."""
    reading, go_on = threading.Event(), threading.Event()

    def slow() -> int:
        reading.set()
        go_on.wait(20)
        return 10 * PAGE

    room = Room(slow)
    answers: list[int | None] = []
    fds = {name: files.new() for name in "ab"}

    def ask(name: str) -> None:
        answers.append(room.promise(name, fds[name], 6 * PAGE))

    threads = [threading.Thread(target=ask, args=(name,)) for name in fds]
    for thread in threads:
        thread.start()
    assert reading.wait(20)
    go_on.set()
    for thread in threads:
        thread.join()
    assert sorted(answers, key=str) == [4 * PAGE, None]
