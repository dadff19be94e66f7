from __future__ import annotations

from lunashm.host.timings import BOUNDS_S, Distribution, Timings


def test_bounds_are_inclusive_and_rise() -> None:
    assert list(BOUNDS_S) == sorted(set(BOUNDS_S))
    for place, bound in enumerate(BOUNDS_S):
        assert Distribution().plus(bound).counts.index(1) == place


def test_what_is_above_every_bound_is_counted_too() -> None:
    distribution = Distribution().plus(0.0).plus(1e9)
    assert (distribution.counts[0], distribution.counts[-1], sum(distribution.counts)) == (1, 1, 2)
    assert distribution.total_s == 1e9


def test_observation_changes_nothing_that_somebody_holds() -> None:
    before = Timings()
    after = before.attached(0.2, waited=False).attached(3.0, waited=True).loaded(2.0, 10).loaded(1.0, 5)
    assert before == Timings()
    assert (after.attach.total_s, after.attach_waited.total_s) == (0.2, 3.0)
    assert (after.load.total_s, sum(after.load.counts), after.load_nbytes) == (3.0, 2, 15)
