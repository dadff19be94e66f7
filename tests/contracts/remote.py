"""The memory contract as a test sees it: allocated in one process, opened in another. Knows no rung.

What comes back wrong comes back as the error that lunashm raised; nothing passes on a rung that was not asked for.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path
from typing import Any, Protocol

import msgspec

from lunashm.protocol import Handle
from tests.contracts.rungs import Entry


class Channel(Protocol):
    """The way to one actor. ``call`` raises what the actor raised."""

    def call(self, name: str, *arguments: Any, descriptor: int | None = None, starved: bool = False) -> Any: ...

    def call_for_descriptor(self, name: str, *arguments: Any) -> int | None:
        """The descriptor that came beside the answer; the caller closes it."""


class RemoteSegment:
    def __init__(self, rung: RemoteRung, number: int, name: str, nbytes: int) -> None:
        self.name = name
        self.nbytes = nbytes
        self._rung = rung
        self._owner = rung.owner
        self.number = number

    @property
    def frozen(self) -> bool:
        return bool(self._owner.call("frozen", self.number))

    def write(self, offset: int, data: bytes) -> None:
        self._owner.call("write", self.number, offset, data)

    def write_staged(self, offset: int, data: bytes) -> tuple[int, bool]:
        """Returns the staging buffer's size, and whether it was read-only."""
        size, read_only = self._owner.call("write_staged", self.number, offset, data)
        return size, read_only

    def write_from_threads(self, threads: int) -> None:
        self._owner.call("write_from_threads", self.number, threads)

    def fill(self, byte: int) -> None:
        self._owner.call("fill", self.number, byte)

    def freeze(self, starved: bool = False) -> None:
        self._owner.call("freeze", self.number, starved=starved)

    def export(self) -> Handle:
        handle = msgspec.convert(self._owner.call("export", self.number), Handle)
        assert (handle.rung, handle.device) == (self._rung.name, self._rung.device)
        return handle

    def descriptor(self) -> int | None:
        """The test's duplicate, closed with this object."""
        descriptor = self._owner.call_for_descriptor("descriptor", self.number)
        if descriptor is not None:
            weakref.finalize(self, os.close, descriptor)
        return descriptor

    def inheritable(self) -> bool | None:
        inheritable: bool | None = self._owner.call("inheritable", self.number)
        return inheritable

    def free(self) -> None:
        self._owner.call("free", self.number)


class RemoteMapping:
    def __init__(self, opener: Channel, number: int, handle: Handle) -> None:
        self.handle = handle
        self._opener = opener
        self._number = number

    def peek(self, offset: int, nbytes: int) -> bytes:
        data = self._opener.call("peek", self._number, offset, nbytes)
        assert isinstance(data, bytes)
        return data

    def all(self) -> bytes:
        return self.peek(0, self.handle.nbytes)

    def digest(self) -> str:
        """SHA-256 of all of it."""
        return str(self._opener.call("digest", self._number))

    def when_gone(self, path: Path) -> None:
        """A line in ``path`` for every call."""
        self._opener.call("when_gone", self._number, str(path))

    def hold(self) -> RemoteMapping:
        """One more reference to the same mapping."""
        return RemoteMapping(self._opener, self._opener.call("hold", self._number), self.handle)

    def drop(self) -> bool:
        """Whether it is gone."""
        return bool(self._opener.call("drop", self._number))

    def buffer_is_read_only(self) -> bool:
        return bool(self._opener.call("buffer_is_read_only", self._number))

    def scribble(self, byte: int) -> str:
        """Write over its first 16 bytes. Returns why it could not, if the opener lives to tell."""
        return str(self._opener.call("scribble", self._number, byte))


class RemoteRung:
    """``owner`` allocates, ``opener`` opens."""

    def __init__(self, entry: Entry, owner: Channel, opener: Channel) -> None:
        self.owner = owner
        self.opener = opener
        self.entry = entry
        self.name, self.device, self.outlives_host = owner.call("facts")
        assert (self.name, self.outlives_host) == (entry.rung, entry.outlives_host)
        assert opener.call("facts") == owner.call("facts")

    def through(self, opener: Channel) -> RemoteRung:
        """The same rung, opened by somebody else."""
        return RemoteRung(self.entry, self.owner, opener)

    def allocate(self, nbytes: int, starved: bool = False) -> RemoteSegment:
        return RemoteSegment(self, *self.owner.call("allocate", nbytes, starved=starved))

    def open(self, handle: Handle, descriptor: int | None = None, starved: bool = False) -> RemoteMapping:
        answer = self.opener.call("open", handle, descriptor=descriptor, starved=starved)
        number, mapped = msgspec.convert(answer, tuple[int, Handle])
        assert mapped == handle
        return RemoteMapping(self.opener, number, mapped)

    def map(self, segment: RemoteSegment, starved: bool = False) -> RemoteMapping:
        """Open it with all that this takes; the test keeps none of it."""
        descriptor = self.owner.call_for_descriptor("descriptor", segment.number)
        try:
            return self.open(segment.export(), descriptor, starved)
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def open_with_number(self, handle: Handle, descriptor: int) -> None:
        """With a descriptor that is a number in the opener and nothing more."""
        self.opener.call("open_with_number", handle, descriptor)

    def free_nbytes(self) -> int:
        return int(self.owner.call("free_nbytes"))

    def total_nbytes(self) -> int:
        return int(self.owner.call("total_nbytes"))

    def reclaim(self) -> list[str]:
        return list(self.owner.call("reclaim"))


__all__ = ["Channel", "RemoteMapping", "RemoteRung", "RemoteSegment"]
