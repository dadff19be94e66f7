"""The suite's own machinery: what goes wrong in an actor is seen by the test, and by that test alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.contracts.actors import ActorDied, ActorProcess, Actors
from tests.contracts.remote import RemoteRung
from tests.contracts.rungs import CPU, Entry, in_processes

MEMFD = next(entry for entry in CPU if entry.rung == "memfd")


@pytest.fixture
def own() -> Iterator[Actors]:
    """Actors of this test alone."""
    own = Actors()
    yield own
    own.stop()


@in_processes
def test_actor_has_the_rung_that_was_asked_for_and_no_torch(
    entry: Entry, rung: RemoteRung, opener: ActorProcess
) -> None:
    assert rung.name == entry.rung
    assert rung.device.startswith("GPU-") if entry.on_gpu else rung.device == "cpu"
    assert opener.call("libraries", "libtorch") == []
    assert bool(opener.call("libraries", "libcuda.so")) == entry.on_gpu


@in_processes
def test_owner_and_opener_are_two_processes(part: Callable[[str], ActorProcess]) -> None:
    assert len({os.getpid(), part("owner").pid, part("opener").pid}) == 3
    assert part("owner").pid == part("owner").pid


def test_actor_that_died_says_how_and_is_started_again(own: Actors) -> None:
    first = own.get(MEMFD, "owner")
    os.kill(first.pid, signal.SIGKILL)
    with pytest.raises(ActorDied) as death:
        first.call("facts")
    assert death.value.status == -signal.SIGKILL
    again = own.get(MEMFD, "owner")
    assert again.pid != first.pid
    assert again.call("facts") == ["memfd", "cpu", True]


def test_actor_that_hangs_fails_the_test_and_is_ended(own: Actors) -> None:
    hanging = own.get(MEMFD, "owner")
    hanging.call("facts")
    os.kill(hanging.pid, signal.SIGSTOP)
    hanging.answer_within(0.1)
    with pytest.raises(pytest.fail.Exception, match=r"did not answer facts within 0\.1 s"):
        hanging.call("facts")
    assert not hanging.alive


def test_error_that_nobody_should_raise_fails_the_test_with_its_traceback(own: Actors) -> None:
    actor = own.get(MEMFD, "owner")
    with pytest.raises(pytest.fail.Exception, match=r"KeyError: 77"):
        actor.call("peek", 77, 0, 1)
    assert actor.alive
