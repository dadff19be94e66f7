"""One GPU as this process uses it: its primary context, and the driver's calls about memory in it.

Knows pointers and sizes, no segments. torch uses the same context, so pointers made here are good in its kernels.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any, Self

from lunashm.errors import ForkedProcess, LunashmError
from lunashm.memory import cuda

log = logging.getLogger(__name__)

_IPC_HANDLE_BYTES = 64
_NO_SUCH_MEMORY = ("CUDA_ERROR_INVALID_VALUE", "CUDA_ERROR_INVALID_HANDLE", "CUDA_ERROR_MAP_FAILED")
"""What the driver says to a handle or descriptor that leads nowhere."""


class Undo:
    """Releasing calls, to be made once, in reverse."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._calls: list[tuple[str, tuple[object, ...]]] = []

    def add(self, name: str, *arguments: object) -> None:
        self._calls.append((name, arguments))

    def forget(self) -> None:
        """They are somebody else's to make."""
        self._calls.clear()

    def run(self) -> bool:
        """Make them all; returns whether none failed. What failed is logged."""
        done = True
        while self._calls:
            name, arguments = self._calls.pop()
            done = self._device.release_within(name, *arguments) and done
        return done


class Device:
    """``with device:`` makes its context the thread's current one for a while. Any thread, nested at will."""

    def __init__(self, gpu: cuda.Gpu) -> None:
        self.gpu = gpu
        self._context: Any = None
        self._lock = threading.Lock()
        self._owner = os.getpid()

    def __enter__(self) -> Self:
        if os.getpid() != self._owner:
            raise ForkedProcess(f"{self.gpu} was in use when this process was forked; start it anew (spawn)")
        if self._context is None:  # never in a finaliser: what it releases was made in the context
            with self._lock:
                self._context = self._context or self.call("cuDevicePrimaryCtxRetain", self.gpu.ordinal)
        self.call("cuCtxPushCurrent", self._context)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release("cuCtxPopCurrent")

    def call(self, name: str, *arguments: object, gone: tuple[str, ...] = ()) -> Any:
        """Raises as :func:`lunashm.memory.cuda.call`."""
        return cuda.call(name, *arguments, place=str(self.gpu), gone=gone)

    def release(self, name: str, *arguments: object) -> bool:
        """A call that gives something back. Failing is logged and returned: what else there is to release still is."""
        try:
            self.call(name, *arguments)
        except LunashmError as exc:
            log.warning("%s; what it should have released may stay until this process ends", exc)
            return False
        return True

    def release_within(self, name: str, *arguments: object) -> bool:
        """:meth:`release` with the context as the current one, or without it, which some calls do not mind."""
        with contextlib.ExitStack() as context:
            try:
                context.enter_context(self)
            except LunashmError as exc:
                log.warning("%s; %s is called without a context", exc, name)
            return self.release(name, *arguments)

    # -- in the context: ``with device:`` around them ------------------------------------------------------------------

    def free_and_total(self) -> tuple[int, int]:
        free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def synchronize(self) -> None:
        """Wait until nothing that was started in this process reads or writes the GPU's memory any more."""
        self.call("cuCtxSynchronize")

    @contextlib.contextmanager
    def in_relaxed_capture(self) -> Iterator[None]:
        """Allocating, mapping and the like in here do not fail because a CUDA graph is being captured meanwhile.

        Waiting for the GPU does: no mode allows that.
        """
        modes = "CUstreamCaptureMode"
        before = self.call(
            "cuThreadExchangeStreamCaptureMode", cuda.constant(modes, "CU_STREAM_CAPTURE_MODE_RELAXED")
        )
        try:
            yield
        finally:
            self.release("cuThreadExchangeStreamCaptureMode", before)

    def zero(self, pointer: int, nbytes: int) -> None:
        self.call("cuMemsetD8", pointer, 0, nbytes)
        self.synchronize()  # copies of other threads need not wait for it by themselves

    def alloc(self, nbytes: int) -> int:
        return int(self.call("cuMemAlloc", nbytes))

    def address_range(self, pointer: int) -> tuple[int, int]:
        """Start and size of the allocation that ``pointer`` leads into."""
        base, nbytes = self.call("cuMemGetAddressRange", pointer)
        return int(base), int(nbytes)

    def ipc_handle(self, pointer: int) -> bytes:
        handle = self.call("cuIpcGetMemHandle", pointer)
        return ctypes.string_at(handle.getPtr(), _IPC_HANDLE_BYTES)

    def ipc_open(self, raw: bytes) -> int:
        """Raises SegmentGone, among others."""
        handle = cuda.struct("CUipcMemHandle")
        ctypes.memmove(handle.getPtr(), raw, _IPC_HANDLE_BYTES)
        flags = cuda.constant("CUipcMem_flags", "CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS").value
        return int(self.call("cuIpcOpenMemHandle", handle, flags, gone=_NO_SUCH_MEMORY))

    # -- memory and addresses apart (VMM) ------------------------------------------------------------------------------

    def granularity(self) -> int:
        """What sizes of exportable memory are multiples of."""
        least = cuda.constant("CUmemAllocationGranularity_flags", "CU_MEM_ALLOC_GRANULARITY_MINIMUM")
        return int(self.call("cuMemGetAllocationGranularity", self._exportable(), least))

    def create(self, nbytes: int) -> int:
        return int(self.call("cuMemCreate", nbytes, self._exportable(), 0))

    def export(self, memory: int) -> int:
        """A new descriptor of it, not inherited by programs that this process starts."""
        fd = int(self.call("cuMemExportToShareableHandle", memory, _as_descriptor(), 0))
        os.set_inheritable(fd, False)
        return fd

    def import_(self, descriptor: int) -> int:
        """Raises SegmentGone, among others. The descriptor stays the caller's."""
        return int(
            self.call("cuMemImportFromShareableHandle", descriptor, _as_descriptor(), gone=_NO_SUCH_MEMORY)
        )

    def reserve(self, nbytes: int) -> int:
        """Addresses, with nothing behind them."""
        return int(self.call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def map(self, pointer: int, nbytes: int, memory: int) -> None:
        """Raises SegmentGone for memory of less than ``nbytes``, among others."""
        self.call("cuMemMap", pointer, nbytes, 0, memory, 0, gone=_NO_SUCH_MEMORY)

    def allow(self, pointer: int, nbytes: int, *, writing: bool) -> None:
        access = cuda.struct("CUmemAccessDesc")
        access.location = self._location()
        right = "READWRITE" if writing else "READ"
        access.flags = cuda.constant("CUmemAccess_flags", f"CU_MEM_ACCESS_FLAGS_PROT_{right}")
        self.call("cuMemSetAccess", pointer, nbytes, [access], 1)

    def _exportable(self) -> Any:
        prop = cuda.struct("CUmemAllocationProp")
        prop.type = cuda.constant("CUmemAllocationType", "CU_MEM_ALLOCATION_TYPE_PINNED")
        prop.requestedHandleTypes = _as_descriptor()
        prop.location = self._location()
        return prop

    def _location(self) -> Any:
        location = cuda.struct("CUmemLocation")
        location.type = cuda.constant("CUmemLocationType", "CU_MEM_LOCATION_TYPE_DEVICE")
        location.id = self.gpu.ordinal
        return location


def _as_descriptor() -> Any:
    return cuda.constant("CUmemAllocationHandleType", "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR")


@functools.cache
def device_of(uuid: str) -> Device:
    """The one Device of this process for a GPU. Raises WrongDevice, SettingsError, ForkedProcess."""
    return Device(cuda.find(uuid))


__all__ = ["Device", "device_of"]
