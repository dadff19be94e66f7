"""What was seen before: peaks, and how full a GPU was when the watching began. Knows no clock; times are arguments."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """``at``: ISO 8601."""

    at: str
    used: int


class History:
    """Of one watching, which ends with its process."""

    def __init__(self) -> None:
        self._peaks: dict[Hashable, int] = {}
        self._starts: dict[str, Start] = {}

    def peak(self, key: Hashable, now: int | None) -> int | None:
        """The highest figure of ``key`` so far, ``now`` included; None before there was one."""
        if now is not None:
            self._peaks[key] = max(now, self._peaks.get(key, now))
        return self._peaks.get(key)

    def start(self, device: str, used: int, at: str) -> Start:
        """The first figure of ``device``: this one, unless there was one before."""
        return self._starts.setdefault(device, Start(at, used))
