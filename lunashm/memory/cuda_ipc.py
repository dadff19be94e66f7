"""The ``cuda-ipc`` rung: a GPU's memory, exported as a CUDA IPC handle. Second choice: it is read-only by convention
alone, and undefined once the host has freed it or died, so that whoever maps it has to watch the host.

The memory comes from the driver, never from torch: its allocator's settings do not matter, and a host needs no torch
for this. The driver counts how often a process has one handle open, so mappings of one segment do not end each other.
"""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from typing import Annotated

import msgspec

from lunashm import process
from lunashm.errors import SegmentGone, SharedMemoryError
from lunashm.memory.cuda_device import Undo
from lunashm.memory.device import BLOCK, DeviceMapping, DeviceRung, DeviceSegment, Record, Size
from lunashm.memory.ending import finish_parked
from lunashm.protocol import Handle

_Raw = Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class IpcRecord(Record, frozen=True):
    """``raw``: the driver's handle, of the whole allocation that the segment starts ``offset``
    bytes into. ``pid``, ``pid_namespace``: whose it is; the driver finds the memory by them."""

    offset: Size
    pid: int
    pid_namespace: int
    raw: _Raw


class IpcSegment(DeviceSegment):
    def _seal(self) -> bytes:
        """The driver can forbid nobody to write. The owner has no way to here, and clients are asked not to (I1)."""
        start, _ = self._device.address_range(self._pointer)
        raw = self._device.ipc_handle(self._pointer)
        offset = self._pointer - start
        record = IpcRecord(1, self._name, self._nbytes, offset, os.getpid(), process.namespace(), raw)
        return msgspec.msgpack.encode(record)


class CudaIpcRung(DeviceRung):
    name = "cuda-ipc"
    outlives_host = False

    def allocate(self, nbytes: int) -> IpcSegment:
        rounded = self.rounded(nbytes, BLOCK)  # alone in its block: clients map the whole of it
        with self._taking(rounded) as device, ExitStack() as made:
            pointer = device.alloc(rounded)
            made.callback(device.release_within, "cuMemFree", pointer)
            device.zero(pointer, rounded)
            name = f"cuda-ipc:{secrets.token_hex(8)}"
            return IpcSegment(self, name, nbytes, pointer, made.pop_all())

    def open(self, handle: Handle, descriptor: int | None = None) -> DeviceMapping:
        record = self._record_in(handle, IpcRecord)
        _check_reach(record)
        finish_parked()
        with self.gpu as device, device.in_relaxed_capture(), ExitStack() as failing:
            opened = Undo(device)
            failing.callback(opened.run)
            pointer = device.ipc_open(record.raw)
            opened.add("cuIpcCloseMemHandle", pointer)
            start, length = device.address_range(pointer)
            at = pointer + record.offset
            if at + record.nbytes > start + length:
                raise SegmentGone(f"segment {record.name} is not where the host said: other memory; attach again")
            failing.pop_all()
            return DeviceMapping(handle, device, at, opened)


def _check_reach(record: IpcRecord) -> None:
    """Raises SharedMemoryError where the driver would not find the memory, or would find another process's."""
    if record.pid_namespace != process.namespace():
        raise SharedMemoryError(
            f"segment {record.name} belongs to a process of another PID namespace, where CUDA IPC does not reach; "
            "start the host with --memory cuda-vmm, or the container with --pid host"
        )
    if record.pid == os.getpid():
        raise SharedMemoryError(
            f"segment {record.name} is this process's own, and CUDA IPC opens memory of other processes only; "
            "attach from another process, or use cuda-vmm"
        )


__all__ = ["CudaIpcRung", "IpcSegment"]
