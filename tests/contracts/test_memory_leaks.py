"""What every rung promises of doing it again and again: nothing stays behind, in the owner or in the opener."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.contracts.actors import ActorProcess
from tests.contracts.remote import RemoteRung
from tests.contracts.rungs import in_processes

CYCLES = 100
WARM_UP = 3
"""What a driver sets up when it is first used stays."""


def counted(rung: RemoteRung, cycle: Callable[[], object]) -> None:
    """Both processes have as much after CYCLES as before."""
    actors = {"owner": rung.owner, "opener": rung.opener}
    for _ in range(WARM_UP):
        cycle()
    before = {part: actor.call("counts") for part, actor in actors.items()}
    for _ in range(CYCLES):
        cycle()
    after = {part: actor.call("counts") for part, actor in actors.items()}
    assert after == before, f"after {CYCLES} cycles {after}, before {before}"


@in_processes
def test_opening_and_dropping_leaves_nothing(rung: RemoteRung) -> None:
    segment = rung.allocate(10_000)
    segment.write(9_999, b"z")
    segment.freeze()

    def cycle() -> None:
        mapping = rung.map(segment)
        assert mapping.peek(9_998, 2) == b"\0z"
        assert mapping.drop()

    counted(rung, cycle)


@in_processes
def test_allocating_and_freeing_leaves_nothing(rung: RemoteRung) -> None:
    names = []

    def cycle() -> None:
        segment = rung.allocate(10_000)
        names.append(segment.name)
        segment.write(0, b"a")
        segment.freeze()
        segment.export()
        segment.descriptor()
        segment.free()

    counted(rung, cycle)
    assert len(set(names)) == CYCLES + WARM_UP
    assert not [name for name in names if Path("/dev/shm", name.removeprefix("/")).exists()]


@in_processes
def test_sharing_and_giving_up_leaves_nothing(rung: RemoteRung) -> None:
    """The whole life of a segment, freed before its mapping goes as often as after."""
    freed_first = True

    def cycle() -> None:
        nonlocal freed_first
        segment = rung.allocate(10_000)
        segment.freeze()
        mapping = rung.map(segment)
        if freed_first:
            segment.free()
        assert mapping.drop()
        segment.free()
        freed_first = not freed_first

    counted(rung, cycle)


@in_processes
def test_segments_that_are_never_frozen_leave_nothing(rung: RemoteRung) -> None:
    counted(rung, lambda: rung.allocate(10_000).free())


@in_processes
def test_several_openers_come_and_go_while_one_stays(
    rung: RemoteRung, part: Callable[[str], ActorProcess]
) -> None:
    segment = rung.allocate(1000)
    segment.write(0, b"for all")
    segment.freeze()
    staying = rung.map(segment)
    openers = [rung.through(part(name)) for name in ("second", "third")]
    for _ in range(10):
        mappings = [opener.map(segment) for opener in openers for _ in range(2)]
        assert {mapping.peek(0, 7) for mapping in mappings} == {b"for all"}
        assert all(mapping.drop() for mapping in mappings)
    assert staying.peek(0, 7) == b"for all"
