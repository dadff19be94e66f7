"""What every rung promises when owners, openers and writers die. Real processes, killed by the kernel."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable
from pathlib import Path

from tests.contracts.account import account
from tests.contracts.actors import ActorDied, ActorProcess
from tests.contracts.remote import RemoteRung, RemoteSegment
from tests.contracts.rungs import Entry, in_processes, only

MIB = 1 << 20
NBYTES = 5 * MIB + 7
DIGEST = hashlib.sha256(b"\x5a" * NBYTES).hexdigest()

read_only = only(lambda entry: entry.read_only and not entry.in_process)


def shared(rung: RemoteRung, nbytes: int = NBYTES) -> RemoteSegment:
    """A segment whose bytes, where it has NBYTES, have DIGEST."""
    segment = rung.allocate(nbytes)
    segment.fill(0x5A)
    segment.freeze()
    return segment


# -- the owner ---------------------------------------------------------------------------------------------------------


@in_processes
def test_opener_survives_its_owner_and_keeps_the_bytes_where_the_rung_says_so(
    entry: Entry, rung: RemoteRung, owner: ActorProcess, second: RemoteRung
) -> None:
    segment = shared(rung)
    mappings = [rung.map(segment), second.map(segment)]
    owner.kill()
    if entry.outlives_host:
        assert [mapping.digest() for mapping in mappings] == [DIGEST, DIGEST]
    assert all(mapping.drop() for mapping in mappings)
    assert rung.opener.call("facts")


@in_processes
def test_new_owner_starts_where_one_was_killed(
    entry: Entry, rung: RemoteRung, owner: ActorProcess, part: Callable[[str], ActorProcess]
) -> None:
    mapping = rung.map(shared(rung))
    owner.kill()
    successor = RemoteRung(entry, part("owner"), rung.opener)
    newer = successor.allocate(1000)
    newer.write(0, b"newer")
    newer.freeze()
    assert successor.map(newer).peek(0, 5) == b"newer"
    mapping.drop()
    successor.reclaim()
    assert successor.map(newer).peek(0, 5) == b"newer"


@in_processes
def test_memory_of_a_killed_owner_comes_back_when_the_last_opener_lets_go(
    entry: Entry, rung: RemoteRung, owner: ActorProcess, part: Callable[[str], ActorProcess]
) -> None:
    successor = RemoteRung(entry, part("successor"), rung.opener)
    room = account(successor, part("opener").pid)
    mapping = rung.map(shared(rung, room.nbytes))
    room.check_taken()
    owner.kill()
    mapping.drop()
    successor.reclaim()
    room.check_given_back()


# -- an opener ---------------------------------------------------------------------------------------------------------


@in_processes
def test_owner_goes_on_when_an_opener_is_killed(rung: RemoteRung, opener: ActorProcess, second: RemoteRung) -> None:
    segment = shared(rung)
    rung.map(segment)
    opener.kill()
    assert second.map(segment).digest() == DIGEST
    segment.free()
    newer = rung.allocate(1000)
    newer.freeze()
    assert second.map(newer).all() == bytes(1000)


@in_processes
def test_room_comes_back_when_the_opener_that_had_it_mapped_is_killed(rung: RemoteRung, opener: ActorProcess) -> None:
    room = account(rung, opener.pid)
    segment = shared(rung, room.nbytes)
    rung.map(segment)
    room.check_taken()
    segment.free()
    opener.kill()
    room.check_given_back()


@in_processes
def test_opener_that_ends_with_memory_mapped_ends_well_and_says_nothing(
    rung: RemoteRung, part: Callable[[str], ActorProcess], tmp_path: Path
) -> None:
    """What is told at the end of a mapping is not told at the end of the interpreter, when nobody can act on it."""
    leaving = part("leaving")
    rung.through(leaving).map(shared(rung)).when_gone(tmp_path / "told")
    assert leaving.stop() == 0
    assert not (tmp_path / "told").exists()


# -- a writer ----------------------------------------------------------------------------------------------------------


@read_only
def test_write_through_a_mapping_harms_the_writer_alone(
    entry: Entry, rung: RemoteRung, opener: ActorProcess, second: RemoteRung
) -> None:
    segment = shared(rung)
    sibling = second.map(segment)
    writer = rung.map(segment)
    try:
        refusal = writer.scribble(0xFF)
    except ActorDied as death:
        assert death.status == -signal.SIGSEGV
    else:
        assert entry.on_gpu and not entry.standin, "it was not killed"
        assert refusal, "the write came through"
        opener.kill()  # its context may be of no use any more
    assert sibling.digest() == DIGEST
    assert second.map(segment).digest() == DIGEST
    assert rung.allocate(1000).name


@only(lambda entry: not entry.read_only)
def test_rung_that_cannot_keep_writers_out_says_so(rung: RemoteRung, second: RemoteRung) -> None:
    """It is a fact about the driver: where it changes, the table of rungs is to be changed."""
    segment = shared(rung)
    sibling = second.map(segment)
    assert rung.map(segment).scribble(0xFF) == ""
    assert sibling.peek(0, 20) == b"\xff" * 16 + b"\x5a" * 4
