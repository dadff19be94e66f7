"""What of the RAM is still free to promise. Knows no rung.

tmpfs counts pages when they are written, so two loads at once would otherwise both be told that there is room for one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable


class Room:
    """``limit``: bytes that are free as the kernel sees it; called with this object's lock held."""

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit = limit
        self._mutex = threading.Lock()
        self._promised: dict[str, tuple[int, int]] = {}

    def free(self) -> int:
        """Bytes free, minus what files in the making were promised and have not written yet."""
        with self._mutex:
            return self._free()

    def promise(self, name: str, fd: int, nbytes: int) -> int | None:
        """Set ``nbytes`` aside for the file ``fd``. Returns what is free where that is less, else None."""
        with self._mutex:
            free = self._free()
            if nbytes > free:
                return free
            self._promised[name] = (fd, nbytes)
            return None

    def settle(self, name: str) -> None:
        """A file is complete, or about to go: nothing is promised to it, its descriptor is not looked at again."""
        with self._mutex:
            self._promised.pop(name, None)

    def _free(self) -> int:
        outstanding = sum(max(0, nbytes - os.fstat(fd).st_blocks * 512) for fd, nbytes in self._promised.values())
        return max(0, self._limit() - outstanding)
