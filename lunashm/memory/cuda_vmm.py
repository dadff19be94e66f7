"""The ``cuda-vmm`` rung: a GPU's memory, exported as a file descriptor. Bytes outlive the host for whoever has them
mapped; read-only is enforced by the GPU's MMU: a kernel that writes there ends its own process's context.

The descriptor travels beside the handle (SCM_RIGHTS). Whoever holds it could map the memory writable: it goes to
clients of the same user only, and these map it read-only.
"""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack

import msgspec

from lunashm.errors import SegmentGone, SharedMemoryError
from lunashm.memory.cuda_device import Device, Undo
from lunashm.memory.device import DeviceMapping, DeviceRung, DeviceSegment, Record
from lunashm.memory.ending import finish_parked
from lunashm.protocol import Handle


class VmmRecord(Record, frozen=True):
    """``rounded``: the bytes of the memory behind the segment."""

    rounded: int


class VmmSegment(DeviceSegment):
    """``window``: undoes the mapping that this process writes through."""

    def __init__(
        self, rung: DeviceRung, record: VmmRecord, memory: int, pointer: int, window: Undo, made: ExitStack
    ) -> None:
        super().__init__(rung, record.name, record.nbytes, pointer, made)
        self._plan = record
        self._memory = memory
        self._window = window
        self._fd = -1

    def descriptor(self) -> int:
        self.export()
        return self._fd

    def _seal(self) -> bytes:
        """Keep the memory and a descriptor of it, and nothing that this process could write through (I1)."""
        self._fd = self._device.export(self._memory)
        self._made.callback(os.close, self._fd)
        self._window.forget()  # done here, where its failing matters
        unmapped = self._device.release("cuMemUnmap", self._pointer, self._plan.rounded)
        if not self._device.release("cuMemAddressFree", self._pointer, self._plan.rounded) or not unmapped:
            self.free()
            raise SharedMemoryError(
                f"segment {self._name} could not be unmapped here, so that it may still be written; load it again"
            )
        return msgspec.msgpack.encode(self._plan)


class CudaVmmRung(DeviceRung):
    name = "cuda-vmm"
    outlives_host = True

    def allocate(self, nbytes: int) -> VmmSegment:
        rounded = self.rounded(nbytes, self.gpu.granularity())
        record = VmmRecord(1, f"cuda-vmm:{secrets.token_hex(8)}", nbytes, rounded)
        with self._taking(rounded) as device, ExitStack() as made:
            memory = device.create(rounded)
            made.callback(device.release_within, "cuMemRelease", memory)
            pointer, window = _map(device, memory, rounded, writing=True)
            made.callback(window.run)
            device.zero(pointer, rounded)
            return VmmSegment(self, record, memory, pointer, window, made.pop_all())

    def open(self, handle: Handle, descriptor: int | None = None) -> DeviceMapping:
        record = self._record_in(handle, VmmRecord)
        if record.rounded < record.nbytes:
            raise SegmentGone(f"segment {record.name} has not the {handle.nbytes} bytes the host said; attach again")
        if descriptor is None:
            raise SegmentGone(f"segment {record.name} came without its descriptor; attach again")
        finish_parked()
        with self.gpu as device, device.in_relaxed_capture(), ExitStack() as imported:
            memory = device.import_(descriptor)
            imported.callback(device.release, "cuMemRelease", memory)  # the mapping keeps the memory
            pointer, window = _map(device, memory, record.rounded, writing=False)
            return DeviceMapping(handle, device, pointer, window)


def _map(device: Device, memory: int, nbytes: int, *, writing: bool) -> tuple[int, Undo]:
    """Memory at an address, and what takes it away from there."""
    window = Undo(device)
    with ExitStack() as failing:
        failing.callback(window.run)
        pointer = device.reserve(nbytes)
        window.add("cuMemAddressFree", pointer, nbytes)
        device.map(pointer, nbytes, memory)
        window.add("cuMemUnmap", pointer, nbytes)
        device.allow(pointer, nbytes, writing=writing)
        failing.pop_all()
    return pointer, window


__all__ = ["CudaVmmRung", "VmmSegment"]
