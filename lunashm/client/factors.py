"""What adapter files hold, read once per process and kept within a bound. Knows nothing of what is in them.

A file is known by its real path, size and modification time: one that changed is read again, and what it held before
is let go. What `stat` cannot see (bytes rewritten in place with the old time set back) is not seen.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Generic, TypeVar

from lunashm.errors import SourceChanged

T = TypeVar("T")

READS = 3
"""How often a file is read that changes while it is read, before that is an error."""


@dataclass(frozen=True)
class _Version:
    """One state of one file."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str) -> _Version:
        """Raises OSError."""
        stat = os.stat(path)
        return cls(os.path.realpath(path), stat.st_size, stat.st_mtime_ns)


class FactorCache(Generic[T]):
    """Contents of files, least recently used out first. Thread-safe; two threads that want one file read it once.

    ``read`` gets the path as :meth:`get` was given it (a link's name may say more than what it leads to).
    ``nbytes_of`` says what a content costs; one above ``limit_nbytes`` is handed out and not kept. Contents are
    shared between all who ask: nobody may change them.
    """

    def __init__(self, read: Callable[[str], T], nbytes_of: Callable[[T], int], limit_nbytes: int) -> None:
        self._read = read
        self._nbytes_of = nbytes_of
        self._limit_nbytes = limit_nbytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, tuple[_Version, T, int]] = OrderedDict()  # by real path, oldest use first
        self._reading: dict[_Version, Future[T]] = {}
        self._nbytes = 0

    @property
    def nbytes(self) -> int:
        """Of all that is kept; at most ``limit_nbytes``."""
        return self._nbytes

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, path: str | os.PathLike[str]) -> T:
        """What the file holds now. Raises OSError, what ``read`` raises, SourceChanged if it never holds still."""
        named = os.fspath(path)
        for _ in range(READS):
            version = _Version.of(named)
            content = self._content(version, named)
            if _Version.of(named) == version:
                return content
            with self._lock:
                self._drop(version.path)
        raise SourceChanged(f"{named} changed each of the {READS} times it was read; try again when it is complete")

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()
            self._nbytes = 0

    def _content(self, version: _Version, named: str) -> T:
        with self._lock:
            found = self._kept.get(version.path)
            if found is not None and found[0] == version:
                self._kept.move_to_end(version.path)
                return found[1]
            future = self._reading.get(version)
            mine = future is None
            if future is None:
                self._drop(version.path)
                future = self._reading[version] = Future()
        if mine:
            self._fulfil(future, version, named)
        return future.result()

    def _fulfil(self, future: Future[T], version: _Version, named: str) -> None:
        """Read the file, for all who wait for ``future``."""
        try:
            content = self._read(named)
            nbytes = self._nbytes_of(content)
        except BaseException as exc:
            with self._lock:
                del self._reading[version]
            future.set_exception(exc)
            raise
        with self._lock:
            del self._reading[version]
            self._keep(version, content, nbytes)
        future.set_result(content)

    def _keep(self, version: _Version, content: T, nbytes: int) -> None:
        self._drop(version.path)
        if nbytes > self._limit_nbytes:
            return
        self._kept[version.path] = version, content, nbytes
        self._nbytes += nbytes
        while self._nbytes > self._limit_nbytes:
            self._drop(next(iter(self._kept)))

    def _drop(self, path: str) -> None:
        found = self._kept.pop(path, None)
        if found is not None:
            self._nbytes -= found[2]
