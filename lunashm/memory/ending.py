"""How a mapping on a GPU ends: first no kernel reads it any more, then it is unmapped, then whoever asked hears of it.

In that order or not at all: the owner may free the memory when it hears. While a CUDA graph is being captured the
driver refuses to wait for the GPU (and being asked may spoil that capture, so let go of models before capturing); such
an end is parked, and tried again with the next mapping that ends or is made here. One that cannot be unmapped at all
(a context that an illegal access has broken) is never told of: its lease ends with the process.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from lunashm import process
from lunashm.errors import LunashmError
from lunashm.memory.cuda_device import Device, Undo

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class End:
    """What is to be done for one mapping. ``owner``: the process that mapped it."""

    device: Device
    owner: int
    unmap: Undo
    callbacks: list[Callable[[], object]]


_parked: deque[End] = deque()


def let_go(end: End) -> None:
    """In whichever thread dropped the last reference, in the middle of anything: takes no lock, starts no thread."""
    if not process.is_own(end.owner):
        _tell(end)  # a forked child has neither the context nor the memory
        return
    _parked.append(end)
    finish_parked()


def finish_parked() -> None:
    """Bring to an end what had to wait. Each is tried once."""
    for _ in range(len(_parked)):
        try:
            end = _parked.popleft()
        except IndexError:  # another thread was faster
            return
        if not process.is_own(end.owner):
            continue
        try:
            with end.device as device, device.in_relaxed_capture():
                device.synchronize()  # kernels that were launched may still read it
        except LunashmError as exc:
            log.warning("a mapping stays for now, as it cannot be known to be unused: %s", exc)
            _parked.append(end)
            continue
        if end.unmap.run():
            _tell(end)


def _tell(end: End) -> None:
    with ExitStack() as calls:  # all of them, whatever one does
        for callback in reversed(end.callbacks):
            calls.callback(callback)


__all__ = ["End", "finish_parked", "let_go"]
