"""The C++ side's plain functions, by ctypes: which device, how much memory."""

from __future__ import annotations

import ctypes
import os

_library = ctypes.CDLL(os.environ["LUNASHM_STANDIN_ACCELERATOR"])

count = _library.standin_npu_count
current = _library.standin_npu_current
empty_cache = _library.standin_npu_empty_cache
owns = _library.standin_npu_owns
owns.argtypes = [ctypes.c_int, ctypes.c_void_p]


class _Stats(ctypes.Structure):
    """``standin::Stats`` of accelerator.h."""

    _fields_ = tuple(
        (name, ctypes.c_int64)
        for name in (
            "allocated", "allocated_peak", "reserved", "reserved_peak", "live", "allocations", "largest", "ooms",
            "to_device", "to_device_bytes", "to_device_largest",
            "from_device", "from_device_bytes", "from_device_largest",
        )
    )  # fmt: skip


def stats(device: int) -> dict[str, int]:
    _check(device)
    found = _Stats()
    _library.standin_npu_stats(device, ctypes.byref(found))
    return {name: getattr(found, name) for name, _ in _Stats._fields_}


def reset(device: int) -> None:
    """Peaks and the largest allocation begin anew, and so does what is counted."""
    _check(device)
    _library.standin_npu_reset(device)


def memory(device: int) -> tuple[int, int]:
    """Free bytes and all bytes, as the driver says."""
    _check(device)
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    _library.standin_npu_memory(device, ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def set_current(device: int) -> None:
    _check(device)
    _library.standin_npu_set_current(device)


def _check(device: int) -> None:
    if not 0 <= device < count():
        raise RuntimeError(f"there is no device npu:{device}: this process sees {count()}")
