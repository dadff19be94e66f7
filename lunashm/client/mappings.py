"""What one process has mapped of a host's memory: one mapping per segment. Knows handles and tickets, not leases."""

from __future__ import annotations

import threading
import weakref

from lunashm.client import handover
from lunashm.memory import Mapping, open_handle
from lunashm.paths import Endpoint
from lunashm.protocol import Handle


class Mappings:
    """Thread-safe. Holds nothing itself: a mapping goes with its last view."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._opening = threading.Lock()
        self._known: weakref.WeakValueDictionary[tuple[str, str, bytes], Mapping] = weakref.WeakValueDictionary()

    def open(self, host_id: str, handles: tuple[Handle, ...], ticket: bytes) -> tuple[Mapping, ...]:
        """All of ``handles``, or none. The ticket is used only if something is not mapped yet, and only for that.

        Raises what :func:`lunashm.client.handover.redeem` raises, SegmentGone, WrongDevice or SharedMemoryError.
        """
        keys = [(host_id, handle.rung, handle.data) for handle in handles]
        with self._opening:
            found = [self._known.get(key) for key in keys]
            if all(mapping is not None for mapping in found):
                ticket = b""
            try:
                with handover.borrowed(self._endpoint, ticket, len(handles)) as descriptors:
                    for number, key in enumerate(keys):
                        if found[number] is None:
                            found[number] = self._known[key] = open_handle(handles[number], descriptors[number])
            except BaseException:
                found.clear()  # now, not when the last traceback goes
                raise
        return tuple(mapping for mapping in found if mapping is not None)
