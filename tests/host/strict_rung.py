"""Memory in the heap whose staging buffers really go when they are given back, as page-locked ones do."""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable, Iterator

from typing_extensions import Buffer

from tests.fakes import HeapRung, HeapSegment


class StrictRung(HeapRung):
    """``before_write`` is called with the number of each write, before it is done; what it raises, the write raises.

    A view of a staging buffer that somebody still holds when it is given back is a BufferError.
    """

    def __init__(self, size: int = 1 << 24, device: str = "cpu") -> None:
        super().__init__(size)
        self.device = device
        self.before_write: Callable[[int], None] = lambda number: None
        self.before_staging: Callable[[int], None] = lambda number: None
        self.writes = 0
        self.staged = 0
        self.ever_staged = 0
        self._mutex = threading.Lock()

    def allocate(self, nbytes: int) -> HeapSegment:
        segment = super().allocate(nbytes)
        write = segment.write

        def counted(offset: int, data: Buffer) -> None:
            view = memoryview(data)  # an error's frames hold it, as those of a real segment do
            with self._mutex:
                number = self.writes
                self.writes += 1
            self.before_write(number)
            write(offset, view)

        segment.write = counted  # type: ignore[method-assign]
        return segment

    @contextlib.contextmanager
    def staging(self, nbytes: int) -> Iterator[memoryview]:
        self.before_staging(self.ever_staged)
        self.ever_staged += 1
        memory = mmap.mmap(-1, nbytes)
        self.staged += 1
        view = memoryview(memory)
        try:
            yield view
        finally:
            view.release()
            memory.close()
            self.staged -= 1
