"""Reads of a file, from the page cache or from its disk, into page-locked memory. Places nothing on a device."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from contextlib import ExitStack
from pathlib import Path

from bench.gpu.copying import MIB, in_threads, pinned
from lunashm.memory.cuda_device import Device


def warm(file: Path) -> None:
    """Into the page cache, as far as memory allows."""
    buffer = bytearray(16 * MIB)
    with open(file, "rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def read(gpu: Device, file: Path, threads: int, block: int, flags: int = 0, most: int = 1 << 60) -> float:
    """GB/s of the file, its first ``most`` bytes, into a buffer for each thread; O_DIRECT wants whole blocks."""
    size = min(file.stat().st_size, most)
    starts = iter(range(0, size - size % block if flags else size, block))
    lock = threading.Lock()
    done = [0] * threads
    with ExitStack() as stack:
        fd = os.open(file, os.O_RDONLY | flags)
        stack.callback(os.close, fd)
        places = [stack.enter_context(pinned(gpu, block)) for _ in range(threads)]
        buffers = [memoryview((ctypes.c_char * block).from_address(place)).cast("B") for place in places]

        def one(number: int) -> None:
            while True:
                with lock:
                    start = next(starts, None)
                if start is None:
                    return
                done[number] += os.preadv(fd, [buffers[number]], start)

        took_s = in_threads(threads, one)
    return sum(done) / took_s / 1e9


def drop(file: Path, notes: list[str]) -> None:
    """Out of the page cache; says so where it stays there (a filesystem in RAM)."""
    fd = os.open(file, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        cached = resident(fd)
    finally:
        os.close(fd)
    note = "the file did not leave the page cache: figures of the disk are of memory, in part at least"
    if cached > 0.01 and note not in notes:
        notes.append(note)


def resident(fd: int) -> float:
    """The share of a file that is in the page cache, by mincore()."""
    size = os.fstat(fd).st_size
    pages = -(-size // mmap.PAGESIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap of the file failed")
    seen = (ctypes.c_ubyte * pages)()
    try:
        libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), seen)
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(page & 1 for page in seen) / pages
