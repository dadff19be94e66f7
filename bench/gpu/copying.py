"""Copies to a device and in RAM, and digests: GB/s of each by itself. Knows no files."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

from blake3 import blake3

from lunashm.memory.cuda_device import Device

MIB = 1 << 20


@contextlib.contextmanager
def copies(gpu: Device, block: int, threads: int) -> Iterator[Callable[[int], float]]:
    """A function of bytes to copy, to GB/s; each thread has a page-locked block and one on the device."""
    with ExitStack() as stack:
        places = [(stack.enter_context(pinned(gpu, block)), _on_device(gpu, block, stack)) for _ in range(threads)]

        def one(number: int, rounds: int) -> None:
            source, target = places[number]
            for _ in range(rounds):
                with gpu as device:
                    device.call("cuMemcpyHtoD", target, source, block)

        def copy(nbytes: int) -> float:
            rounds = max(1, nbytes // block // threads)
            took_s = in_threads(threads, lambda number: one(number, rounds))
            return rounds * threads * block / took_s / 1e9

        copy(block * threads)
        yield copy


@contextlib.contextmanager
def pinned(gpu: Device, nbytes: int) -> Iterator[int]:
    """The address of page-locked memory that has been written to."""
    with gpu as device:
        pointer = int(device.call("cuMemHostAlloc", nbytes, 0))
    try:
        ctypes.memset(pointer, 1, nbytes)
        yield pointer
    finally:
        gpu.release_within("cuMemFreeHost", pointer)


def _on_device(gpu: Device, nbytes: int, stack: ExitStack) -> int:
    with gpu as device:
        pointer = device.alloc(nbytes)
    stack.callback(gpu.release_within, "cuMemFree", pointer)
    return pointer


def torch_copy(block: int, nbytes: int) -> float:
    import torch  # noqa: PLC0415 - it takes seconds, and most steps need none of it

    from bench.gpu import torch_gpu  # noqa: PLC0415

    source = torch_gpu.pinned(block)
    target = torch.empty(block, dtype=torch.uint8, device=torch_gpu.device())
    target.copy_(source)
    torch.cuda.synchronize()
    rounds = max(1, nbytes // block)
    began = time.perf_counter()
    for _ in range(rounds):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return rounds * block / (time.perf_counter() - began) / 1e9


def copy_in_ram(nbytes: int, threads: int) -> float:
    """Between buffers of 64 MiB for each thread, larger than caches together."""
    block = min(64 * MIB, nbytes)
    pairs = [(ctypes.create_string_buffer(block), ctypes.create_string_buffer(block)) for _ in range(threads)]
    for buffer in (buffer for pair in pairs for buffer in pair):
        ctypes.memset(buffer, 1, block)  # pages that nobody wrote to are all the same one
    rounds = max(1, nbytes // block // threads)

    def one(number: int) -> None:
        for _ in range(rounds):
            ctypes.memmove(*pairs[number], block)

    return rounds * threads * block / in_threads(threads, one) / 1e9


def digest(nbytes: int, block: int, threads: int) -> float:
    """Of one block again and again, with the digest's own threads: as the host does it."""
    piece, hasher = os.urandom(block), blake3(max_threads=threads)
    rounds = max(1, nbytes // block)
    began = time.perf_counter()
    for _ in range(rounds):
        hasher.update(piece)
    return rounds * block / (time.perf_counter() - began) / 1e9


def in_threads(threads: int, one: Callable[[int], Any]) -> float:
    """Seconds until all have ended. Raises the first error of theirs."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            one(number)
        except BaseException as exc:  # noqa: BLE001 - raised below
            errors.append(exc)

    workers = [threading.Thread(target=guarded, args=(number,)) for number in range(threads)]
    began = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    took_s = time.perf_counter() - began
    if errors:
        raise errors[0]
    return took_s
