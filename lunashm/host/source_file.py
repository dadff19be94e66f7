"""A file that is being loaded: its bytes, and whether it is still the file that was asked for. Knows no format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from lunashm.errors import SourceChanged
from lunashm.host.checkpoint import open_read, source_of, unreadable
from lunashm.manifest import Source


class SourceFile:
    """Made by :func:`open_source`. Any thread may read."""

    def __init__(self, source: Source, fd: int) -> None:
        self._source = source
        self._fd = fd

    def read(self, start: int, data: memoryview) -> None:
        """Fill ``data`` from ``start`` bytes into the file. Raises SourceChanged where it ends, ModelNotFound."""
        done = 0
        while done < len(data):
            with data[done:] as rest:
                try:
                    count = os.preadv(self._fd, [rest], start + done)
                except OSError as exc:
                    raise unreadable(self._source.path, exc) from exc
            if count == 0:
                raise SourceChanged(
                    f"{self._source.path} was cut at byte {start + done} while it was loaded; load it again"
                )
            done += count

    def refuse_change(self) -> None:
        """Raises SourceChanged if stat sees another file than it did, ModelNotFound if it sees none."""
        try:
            found = os.fstat(self._fd)
        except OSError as exc:
            raise unreadable(self._source.path, exc) from exc
        if source_of(self._source.path, found) != self._source:
            raise SourceChanged(
                f"{self._source.path} changed while it was being loaded; load it again when it is complete"
            )


@contextmanager
def open_source(source: Source) -> Iterator[SourceFile]:
    """Raises ModelNotFound."""
    fd = open_read(source.path)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        yield SourceFile(source, fd)
    finally:
        os.close(fd)
