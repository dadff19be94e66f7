"""Threads that fill a ring of buffers, and one that empties it in order. Knows neither files nor memory.

Nobody can wait for ever. Whoever takes the next piece of work has a buffer in hand already, so the oldest piece that is
missing always has one; every reader ends with a word to the caller, whatever happened to it; and when the caller
leaves, for whatever reason, it wakes and joins them all.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

_W = TypeVar("_W")


class Ring(Generic[_W]):
    """``fill`` is called in ``readers`` threads at once, each time with a buffer of its own; :meth:`run` once."""

    def __init__(
        self,
        work: Iterable[_W],
        buffers: Sequence[memoryview],
        readers: int,
        fill: Callable[[_W, memoryview], None],
    ) -> None:
        self._work = enumerate(work)
        self._fill = fill
        self._next = threading.Lock()
        self._stopping = threading.Event()
        self._free: SimpleQueue[memoryview | None] = SimpleQueue()
        self._full: SimpleQueue[tuple[int, _W, memoryview] | BaseException | None] = SimpleQueue()
        for buffer in buffers:
            self._free.put(buffer)
        names = [f"lunashm-reader-{number}" for number in range(readers)]
        self._readers = [threading.Thread(target=self._read, name=name) for name in names]

    def run(self, take: Callable[[_W, memoryview], None]) -> None:
        """Call ``take`` in this thread with every piece of work, in order, and the buffer that was filled for it.

        Raises the first error of ``fill`` or ``take``. When this ends, no reader is left, and no view of a buffer that
        ``fill`` made.
        """
        try:
            for reader in self._readers:
                reader.start()
            self._take_all(take)
        finally:
            self._stopping.set()
            for _ in self._readers:
                self._free.put(None)  # wakes one that still waits for a buffer
            for reader in self._readers:
                if reader.ident is not None:  # it was started
                    reader.join()

    def _take_all(self, take: Callable[[_W, memoryview], None]) -> None:
        early: dict[int, tuple[_W, memoryview]] = {}
        reading = len(self._readers)
        number = 0
        while reading or early:
            while number not in early:
                item = self._full.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    reading -= 1
                    if not reading:  # nothing can come any more, and what came was taken in order
                        return
                else:
                    early[item[0]] = item[1:]
            work, buffer = early.pop(number)
            take(work, buffer)
            self._free.put(buffer)
            number += 1

    def _read(self) -> None:
        try:
            while (buffer := self._free.get()) is not None and not self._stopping.is_set():
                with self._next:
                    numbered = next(self._work, None)
                if numbered is None:
                    self._free.put(buffer)  # the next reader needs one, too, to see that there is no more work
                    break
                number, work = numbered
                self._fill(work, buffer)
                self._full.put((number, work, buffer))
            self._full.put(None)
        except BaseException as exc:  # noqa: BLE001 - raised again by run(), in the caller's thread
            _let_go_of_buffers(exc)
            self._full.put(exc)


def _let_go_of_buffers(error: BaseException) -> None:
    """The frames an error came through hold views of a buffer, and the caller wants its memory back."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__context__
