"""The stand-in's own functions, for processes that run on it: what is to fail, what was called, what is alive."""

from __future__ import annotations

import ctypes
from pathlib import Path

from tests.standin.build import LIBRARY

KINDS = ("allocations", "imports", "pinned", "handles", "reservations", "mappings")
_library = ctypes.CDLL(LIBRARY)
_library.standin_calls.restype = ctypes.c_char_p
_library.standin_used.restype = ctypes.c_size_t
_library.standin_gpu.argtypes = [ctypes.c_uint64]


def fail(symbol: str, error: int, nth: int = 1) -> None:
    """The ``nth`` call of ``symbol`` from now fails. One that releases something does its work first."""
    _library.standin_fail(symbol.encode(), error, nth)


def refuse(symbol: str, error: int, nth: int = 1) -> None:
    """Likewise, but nothing is done."""
    _library.standin_refuse(symbol.encode(), error, nth)


def calls() -> list[str]:
    return str(_library.standin_calls().decode()).split()


def forget() -> None:
    """Calls so far, and failures that are still to come."""
    _library.standin_forget()


def live() -> dict[str, int]:
    """What is alive in this process, without what there is none of."""
    counts = {kind: int(_library.standin_live(kind.encode())) for kind in KINDS}
    counts["descriptors"] = sum("memfd:standin" in link for link in _links())
    return {kind: count for kind, count in counts.items() if count}


def contexts() -> int:
    return int(_library.standin_live(b"contexts"))


def used(gpu: int) -> int:
    return int(_library.standin_used(gpu))


def gpu_of(pointer: int) -> int:
    """The place in the machine of the GPU that a pointer leads to; -1 for none."""
    return int(_library.standin_gpu(pointer))


def loaded() -> set[str]:
    """The files that this process has loaded a driver from."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in maps if Path(line.split()[-1]).name.startswith("libcuda.so")}


def _links() -> list[str]:
    found = []
    for fd in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(fd.readlink()))
        except FileNotFoundError:  # the listing's own
            continue
    return found
