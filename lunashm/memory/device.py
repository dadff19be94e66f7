"""Segments in a GPU's memory, and their mappings: what ``cuda-vmm`` and ``cuda-ipc`` have in common."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from typing_extensions import Buffer

from lunashm.errors import (
    OutOfSharedMemory,
    SegmentFrozen,
    SegmentGone,
    SegmentNotFrozen,
    WrongDevice,
)
from lunashm.memory.cuda_device import Device, Undo, device_of
from lunashm.memory.ending import End, let_go
from lunashm.memory.files import size
from lunashm.protocol import Handle

log = logging.getLogger(__name__)

BLOCK = 2 << 20
"""Smaller allocations may share a block of this size with others, and what is exported is the whole block."""


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


class DeviceSegment:
    """A segment this process owns. Subclasses say how it is made, exported and let go.

    ``made``: what undoes its making, undone by :meth:`free`. Zeroed here: memory on a GPU keeps what was there before.
    """

    def __init__(self, rung: DeviceRung, name: str, nbytes: int, pointer: int, made: ExitStack) -> None:
        self._rung = rung
        self._device = rung.gpu
        self._name = name
        self._nbytes = nbytes
        self._pointer = pointer
        self._made = made
        self._record: bytes | None = None
        self._freed = False

    @property
    def name(self) -> str:
        return self._name

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def frozen(self) -> bool:
        return self._record is not None

    def write(self, offset: int, data: Buffer) -> None:
        self._check_there()
        if self.frozen:
            raise SegmentFrozen(f"segment {self._name} is frozen; its bytes never change again")
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > self._nbytes:
            raise ValueError(f"{len(view)} bytes at {offset} do not fit segment {self._name} ({self._nbytes} bytes)")
        if view:
            with self._device as device:
                device.call("cuMemcpyHtoD", self._pointer + offset, view, len(view))

    def freeze(self) -> None:
        self._check_there()
        if self.frozen:
            return
        with self._device as device:
            device.synchronize()  # a copy returns when its source may be reused, not when it has arrived
            self._record = self._seal()

    def export(self) -> Handle:
        self._check_there()
        if self._record is None:
            raise SegmentNotFrozen(f"segment {self._name} is still writable; freeze() it before exporting it")
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

    def _check_there(self) -> None:
        if self._freed:
            raise SegmentGone(f"segment {self._name} was freed")


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
        if nbytes <= 0:
            raise ValueError(f"a segment has at least one byte, not {nbytes}")
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

    def _check_device(self, handle: Handle) -> None:
        if handle.device != self.device:
            raise WrongDevice(f"the segment is on {handle.device}, and was to be opened on {self.device}")


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


__all__ = ["BLOCK", "DeviceMapping", "DeviceRung", "DeviceSegment", "Stretch"]
