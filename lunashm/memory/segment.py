"""What every rung's own segments have in common: a name, a size, and when they may be written and exported."""

from __future__ import annotations

from typing_extensions import Buffer

from lunashm.errors import SegmentFrozen, SegmentGone, SegmentNotFrozen


class OwnedSegment:
    """A segment this process owns. Subclasses say where its bytes are, and what freezing and freeing mean."""

    def __init__(self, name: str, nbytes: int) -> None:
        self._name = name
        self._nbytes = nbytes
        self._frozen = False
        self._freed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def frozen(self) -> bool:
        return self._frozen

    def write(self, offset: int, data: Buffer) -> None:
        self._check_there()
        if self._frozen:
            raise SegmentFrozen(f"segment {self._name} is frozen; its bytes never change again")
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > self._nbytes:
            raise ValueError(f"{len(view)} bytes at {offset} do not fit segment {self._name} ({self._nbytes} bytes)")
        self._put(offset, view)

    def _put(self, offset: int, view: memoryview) -> None:
        """Copy ``view``, which fits. Raises SharedMemoryError."""
        raise NotImplementedError

    def _check_there(self) -> None:
        if self._freed:
            raise SegmentGone(f"segment {self._name} was freed")

    def _check_exportable(self) -> None:
        self._check_there()
        if not self._frozen:
            raise SegmentNotFrozen(f"segment {self._name} is still writable; freeze() it before exporting it")


def check_size(nbytes: int) -> None:
    """Raises ValueError."""
    if nbytes <= 0:
        raise ValueError(f"a segment has at least one byte, not {nbytes}")


__all__ = ["OwnedSegment", "check_size"]
