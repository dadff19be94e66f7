"""How long attaches and loads took: distributions that are never changed. Knows no Prometheus and no clock.

An observation makes a new value, so whoever keeps the old one (a snapshot that other threads read) keeps it whole.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Self

BOUNDS_S = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0),
)
"""Upper bounds in seconds, inclusive: from an attach to what is there to a load over a slow network drive."""


@dataclass(frozen=True)
class Distribution:
    """``counts``: how many fell at or below each bound and above the one before; the last, above all bounds."""

    counts: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    total_s: float = 0.0

    def plus(self, seconds: float) -> Self:
        place = bisect_left(BOUNDS_S, seconds)
        counts = (*self.counts[:place], self.counts[place] + 1, *self.counts[place + 1 :])
        return replace(self, counts=counts, total_s=self.total_s + seconds)


@dataclass(frozen=True)
class Timings:
    """``attach``: answered at once, the model was there. ``attach_waited``: the answer waited for a load.

    ``load_nbytes``: of the files that the loads in ``load`` have read.
    """

    attach: Distribution = Distribution()
    attach_waited: Distribution = Distribution()
    load: Distribution = Distribution()
    load_nbytes: int = 0

    def attached(self, seconds: float, *, waited: bool) -> Self:
        if waited:
            return replace(self, attach_waited=self.attach_waited.plus(seconds))
        return replace(self, attach=self.attach.plus(seconds))

    def loaded(self, seconds: float, nbytes: int) -> Self:
        return replace(self, load=self.load.plus(seconds), load_nbytes=self.load_nbytes + nbytes)
