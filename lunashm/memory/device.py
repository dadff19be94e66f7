"""Segments in a GPU's memory, and their mappings: what ``cuda-vmm`` and ``cuda-ipc`` have in common."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from lunashm.errors import (
    OutOfSharedMemory,
    SegmentGone,
    WrongDevice,
)
from lunashm.memory.cuda_device import Device, Undo, device_of
from lunashm.memory.ending import End, let_go
from lunashm.memory.files import size
from lunashm.memory.segment import OwnedSegment, check_size
from lunashm.protocol import Handle

log = logging.getLogger(__name__)

BLOCK = 2 << 20
"""Smaller allocations may share a block of this size with others, and what is exported is the whole block."""


Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
"""Bytes that an address may be apart from another."""


class Stretch:
    """Some bytes of a mapping, which it keeps alive. torch.as_tensor() takes it by ``__cuda_array_interface__``."""

    def __init__(self, mapping: DeviceMapping, pointer: int, nbytes: int) -> None:
        self._mapping = mapping
        self.pointer = pointer
        self.nbytes = nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return _interface(self.pointer, self.nbytes)


class DeviceMapping:
    """A segment in this process's address space on the GPU. ``unmap`` is what undoes that."""

    def __init__(self, handle: Handle, device: Device, pointer: int, unmap: Undo) -> None:
        self.handle = handle
        self.pointer = pointer
        self.nbytes = handle.nbytes
        self._device = device
        self._callbacks: list[Callable[[], object]] = []
        weakref.finalize(self, let_go, End(device, os.getpid(), unmap, self._callbacks)).atexit = False

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return _interface(self.pointer, self.nbytes)

    def at(self, offset: int, nbytes: int) -> Stretch:
        """Raises ValueError outside the segment."""
        self._check_within(offset, nbytes)
        return Stretch(self, self.pointer + offset, nbytes)

    def peek(self, offset: int, nbytes: int) -> memoryview:
        """A copy, in RAM."""
        self._check_within(offset, nbytes)
        copy = bytearray(nbytes)
        if nbytes:
            with self._device as device:
                device.call("cuMemcpyDtoH", copy, self.pointer + offset, nbytes)
        return memoryview(copy).toreadonly()

    def when_gone(self, callback: Callable[[], object]) -> None:
        """Called after the memory was unmapped, which waits until no kernel of this process reads it; see ending.py."""
        self._callbacks.append(callback)

    def _check_within(self, offset: int, nbytes: int) -> None:
        if offset < 0 or nbytes < 0 or offset + nbytes > self.nbytes:
            raise ValueError(f"{nbytes} bytes at {offset} are not in a segment of {self.nbytes} bytes")


def _interface(pointer: int, nbytes: int) -> dict[str, Any]:
    """Version 3. Not marked as read-only, which torch refuses; whether it is, the rung knows."""
    return {
        "version": 3, "shape": (nbytes,), "typestr": "|u1", "strides": None, "data": (pointer, False), "stream": None,
    }  # fmt: skip


class DeviceSegment(OwnedSegment):
    """Subclasses say how it is made, exported and let go.

    ``made``: what undoes its making, undone by :meth:`free`. Zeroed here: memory on a GPU keeps what was there before.
    """

    def __init__(self, rung: DeviceRung, name: str, nbytes: int, pointer: int, made: ExitStack) -> None:
        super().__init__(name, nbytes)
        self._rung = rung
        self._device = rung.gpu
        self._pointer = pointer
        self._made = made
        self._record = b""

    def _put(self, offset: int, view: memoryview) -> None:
        if view:
            with self._device as device:
                device.call("cuMemcpyHtoD", self._pointer + offset, view, len(view))

    def freeze(self) -> None:
        self._check_there()
        if self._frozen:
            return
        with self._device as device:
            device.synchronize()  # a copy returns when its source may be reused, not when it has arrived
            self._record = self._seal()
        self._frozen = True

    def export(self) -> Handle:
        self._check_exportable()
        return Handle(rung=self._rung.name, device=self._rung.device, nbytes=self._nbytes, data=self._record)

    def descriptor(self) -> int | None:
        self.export()
        return None

    def free(self) -> None:
        """What the driver refuses to release is logged, and the rest is released all the same."""
        self._freed = True
        self._made.close()

    def _seal(self) -> bytes:
        """Prepare the export, and say what the handle has to carry. Raises SharedMemoryError."""
        raise NotImplementedError


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What the handle of a GPU's segment carries, at least. ``nbytes``: of the segment."""

    version: Literal[1]
    name: str
    nbytes: Size


_R = TypeVar("_R", bound=Record)


class DeviceRung:
    """Memory of one GPU. Raises WrongDevice for one that this process does not see."""

    name: str

    def __init__(self, device: str) -> None:
        self.device = device
        self.gpu = device_of(device)

    def staging(self, nbytes: int) -> contextlib.AbstractContextManager[memoryview]:
        return _pinned(self.gpu, nbytes)

    def rounded(self, nbytes: int, block: int) -> int:
        """Raises ValueError."""
        check_size(nbytes)
        return -(-nbytes // block) * block

    def free_nbytes(self) -> int:
        """As the driver counts it, all processes together."""
        with self.gpu as device:
            return device.free_and_total()[0]

    def total_nbytes(self) -> int:
        with self.gpu as device:
            return device.free_and_total()[1]

    def reclaim(self) -> list[str]:
        """The driver frees a dead process's memory: nothing is ever left."""
        return []

    @contextlib.contextmanager
    def _taking(self, nbytes: int) -> Iterator[Device]:
        """Take ``nbytes`` in the block. Raises OutOfSharedMemory where they are not free, before anything is taken."""
        with self.gpu as device:
            free, total = device.free_and_total()
            if nbytes > free:
                raise self._no_room(nbytes, free, total)
            try:
                yield device
            except OutOfSharedMemory as exc:  # another process was faster
                raise self._no_room(nbytes, *device.free_and_total()) from exc

    def _no_room(self, nbytes: int, free: int, total: int) -> OutOfSharedMemory:
        return OutOfSharedMemory(
            f"a segment does not fit on {self.gpu.gpu}: {size(nbytes)} needed, {size(free)} free of {size(total)}; "
            "unload a model (lunashm unload), close what else uses the GPU, or load fewer bytes (--dtype)"
        )

    def _record_in(self, handle: Handle, kind: type[_R]) -> _R:
        """What a handle of ours carries. Raises WrongDevice, or SegmentGone for one that is not ours."""
        if handle.device != self.device:
            raise WrongDevice(f"the segment is on {handle.device}, and was to be opened on {self.device}")
        try:
            record = msgspec.msgpack.decode(handle.data, type=kind)
        except msgspec.DecodeError as exc:
            raise SegmentGone(f"the host names memory {handle.data!r}, which no {self.name} rung makes: {exc}") from exc
        if not 0 < handle.nbytes == record.nbytes:
            raise SegmentGone(f"segment {record.name} has not the {handle.nbytes} bytes the host said; attach again")
        return record


@contextlib.contextmanager
def _pinned(device: Device, nbytes: int) -> Iterator[memoryview]:
    """Page-locked memory. It is gone when the block ends: keep no view of it."""
    try:
        with device:
            pointer = int(device.call("cuMemHostAlloc", max(nbytes, 1), 0))
    except OutOfSharedMemory as exc:
        raise OutOfSharedMemory(
            f"there is no RAM to lock for copying to {device.gpu} ({size(nbytes)}; cuMemHostAlloc: OUT_OF_MEMORY); "
            "free some, or raise the container's memory limit"
        ) from exc
    try:
        yield memoryview((ctypes.c_char * nbytes).from_address(pointer)).cast("B")
    finally:
        device.release_within("cuMemFreeHost", pointer)


__all__ = ["BLOCK", "DeviceMapping", "DeviceRung", "DeviceSegment", "Record", "Size", "Stretch"]
