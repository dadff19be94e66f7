"""What the tests of the memory contract are given. ``entry`` comes from the folder's pytest_generate_tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.contracts.actors import ActorProcess, Actors, InProcess
from tests.contracts.remote import RemoteRung, RemoteSegment
from tests.contracts.rungs import Entry
from tests.fakes import HeapRung


@pytest.fixture(scope="session")
def actors() -> Iterator[Actors]:
    actors = Actors()
    yield actors
    actors.stop()


@pytest.fixture
def part(entry: Entry, actors: Actors) -> Iterator[Callable[[str], ActorProcess]]:
    """The process that plays a part: ``owner``, ``opener``, or one more opener by any other name."""
    yield lambda name: actors.get(entry, name)
    actors.clean(entry)


@pytest.fixture
def rung(entry: Entry, part: Callable[[str], ActorProcess]) -> RemoteRung:
    if entry.in_process:
        fake = InProcess(HeapRung())
        return RemoteRung(entry, fake, fake)
    return RemoteRung(entry, part("owner"), part("opener"))


@pytest.fixture
def owner(part: Callable[[str], ActorProcess]) -> ActorProcess:
    return part("owner")


@pytest.fixture
def opener(part: Callable[[str], ActorProcess]) -> ActorProcess:
    return part("opener")


@pytest.fixture
def second(rung: RemoteRung, part: Callable[[str], ActorProcess]) -> RemoteRung:
    """The rung, opened by a second process."""
    return rung.through(part("second"))


@pytest.fixture
def segment(rung: RemoteRung) -> RemoteSegment:
    return rung.allocate(1000)
