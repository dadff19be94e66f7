from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from lunashm.usage import ProcessId, Unseen
from lunashm.usage.meter import CHANGE_NBYTES, Meter
from lunashm.usage.ram import Ram, Resident

A, B = ProcessId(1, 7), ProcessId(2, 7)
GB = 10**9


@dataclass
class Machine:
    """Processes that map one segment of 4 GB together, and what looking at them has cost."""

    resident: dict[ProcessId, Resident | Unseen]
    now: float = 100.0
    used: float = 0.0
    walks: list[ProcessId] = field(default_factory=list)

    def walk(self, who: ProcessId, shared: int) -> Ram | Unseen:
        self.walks.append(who)
        self.used += 0.05
        found = self.resident[who]
        assert isinstance(found, Resident)
        return Ram(found.anonymous + 2 * GB, 2 * GB, found.anonymous, shared)

    def walked(self) -> list[ProcessId]:
        """Since the last question."""
        walks, self.walks = self.walks, []
        return walks


@pytest.fixture
def machine() -> Machine:
    return Machine({A: Resident(GB, 0, 4 * GB), B: Resident(GB, 0, 4 * GB)})


@pytest.fixture
def meter(machine: Machine) -> Meter:
    return Meter(machine.resident.__getitem__, machine.walk, lambda: machine.now, lambda: machine.used)


def test_first_look_walks_everybody(meter: Meter, machine: Machine) -> None:
    assert meter.read([A, B]) == dict.fromkeys((A, B), Ram(3 * GB, 2 * GB, GB, 4 * GB))
    assert machine.walked() == [A, B]


def test_rounds_take_two_hundredths_of_a_core(meter: Meter, machine: Machine) -> None:
    meter.read([A, B])
    machine.walked()
    machine.now += 4.9  # a round costs 0.1 s
    meter.read([A, B])
    assert machine.walked() == []
    machine.now += 0.2
    meter.read([A, B])
    assert machine.walked() == [A, B]


def test_anonymous_memory_is_followed_between_rounds(meter: Meter, machine: Machine) -> None:
    meter.read([A, B])
    machine.resident[A] = Resident(3 * GB, 0, 4 * GB)
    machine.now += 1
    assert meter.read([A, B])[A] == Ram(5 * GB, 2 * GB, 3 * GB, 4 * GB)
    assert machine.walked() == [A, B], "only the first"
    machine.resident[A] = Resident(GB // 2, 0, 4 * GB)
    assert meter.read([A, B])[A] == Ram(2 * GB + GB // 2, 2 * GB, GB // 2, 4 * GB)


@pytest.mark.parametrize("change", [Resident(GB, CHANGE_NBYTES, 4 * GB), Resident(GB, 0, 4 * GB - CHANGE_NBYTES)])
def test_changed_mappings_bring_the_round_forward(meter: Meter, machine: Machine, change: Resident) -> None:
    meter.read([A, B])
    machine.walked()
    machine.resident[B] = change
    machine.now += 0.4
    meter.read([A, B])
    assert machine.walked() == [], "a fifth of a core, whatever happens"
    machine.now += 0.2
    meter.read([A, B])
    assert machine.walked() == [A, B], "all of them: their shares of a page belong together"


def test_process_that_comes_or_goes_has_everybody_walked_at_once(meter: Meter, machine: Machine) -> None:
    meter.read([A])
    machine.walked()
    meter.read([A, B])
    assert machine.walked() == [A, B]
    machine.resident[A] = Unseen("ended just now")
    assert meter.read([A, B]) == {A: Unseen("ended just now"), B: Ram(3 * GB, 2 * GB, GB, 4 * GB)}
    assert machine.walked() == [B]


def test_process_that_cannot_be_walked_keeps_its_reason(machine: Machine) -> None:
    meter = Meter(machine.resident.__getitem__, lambda who, shared: Unseen("another user's"))
    assert meter.read([A]) == meter.read([A]) == {A: Unseen("another user's")}
