"""Whatever fails, in whichever thread and at whichever block: one error, and nothing is left.

A load that waits for ever is stopped by the time limit.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from lunashm import views
from lunashm.errors import LoadCancelled, ModelNotFound, OutOfSharedMemory, SharedMemoryError, SourceChanged
from lunashm.host import checkpoint, loader
from lunashm.host.loader import plan
from lunashm.host.pace import Pace
from lunashm.manifest import DtypeRule, check_rules
from tests import checkpoints
from tests.host.strict_rung import StrictRung

pytestmark = pytest.mark.timeout(60)

TENSORS = {f"t{number}": ("F32", (16,)) for number in range(24)}
AS_F16 = check_rules([DtypeRule("", "F16")])
BLOCK_NBYTES = 256
BLOCKS = range(0, 12, 2)
"""Some of them; the file has more, and fewer than half of them fit into the ring."""

PACES = [Pace(BLOCK_NBYTES, 3, 1, 1), Pace(BLOCK_NBYTES, 5, 4, 1), Pace(BLOCK_NBYTES, 2, 4, 1)]


class Scene:
    """A file, its header as it was read, and strict memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        checkpoints.write(path, TENSORS)
        self.found = checkpoint.read(path)
        assert self.found.source.size > 2 * BLOCK_NBYTES * len(BLOCKS)
        self.rung = StrictRung()
        self._before = self._left()

    def load(self, pace: Pace, progress: loader.Progress | None = None, rules: tuple[DtypeRule, ...] = ()) -> None:
        loader.load(self.found, plan(self.found, rules), self.rung, progress or (lambda done, total: None), pace)

    def nothing_is_left(self) -> bool:
        return self._left() == self._before and self.rung.segments == {} and self.rung.staged == 0

    def _left(self) -> tuple[int, int]:
        return threading.active_count(), len(os.listdir("/proc/self/fd"))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "m.safetensors")


def fail_at(number: int, error: BaseException) -> Callable[[int], None]:
    def check(now: int) -> None:
        if now == number:
            raise error

    return check


every_pace = pytest.mark.parametrize("pace", PACES, ids=lambda pace: f"{pace.readers}readers{pace.buffers}buffers")
at_each_block = pytest.mark.parametrize("block", BLOCKS)


@every_pace
@at_each_block
@pytest.mark.parametrize("error", [OutOfSharedMemory("the device is full"), SharedMemoryError("copy failed")])
def test_memory_that_fails_at_a_block(scene: Scene, pace: Pace, block: int, error: SharedMemoryError) -> None:
    scene.rung.before_write = fail_at(block, error)
    with pytest.raises(type(error), match=error.message):
        scene.load(pace)
    assert scene.nothing_is_left()


@every_pace
def test_memory_that_fails_for_every_reader_at_once(scene: Scene, pace: Pace) -> None:
    def fail(number: int) -> None:
        raise OutOfSharedMemory("the device is full")

    scene.rung.before_write = fail
    with pytest.raises(OutOfSharedMemory):
        scene.load(pace)
    assert scene.nothing_is_left()


@every_pace
@at_each_block
def test_conversion_that_fails_at_a_block(
    scene: Scene, pace: Pace, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, calls = views.convert, iter(range(1000))

    def fail(*arguments: object) -> memoryview:
        if next(calls) == block:
            raise MemoryError("no room to convert")
        return convert(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(views, "convert", fail)
    with pytest.raises(MemoryError):
        scene.load(pace, rules=AS_F16)
    assert scene.nothing_is_left()


@every_pace
@at_each_block
def test_disk_that_fails_at_a_block(scene: Scene, pace: Pace, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def fail(fd: int, parts: list[memoryview], start: int) -> int:
        if start >= block * BLOCK_NBYTES:
            raise OSError(5, "Input/output error")
        return preadv(fd, parts, start)

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(ModelNotFound, match="Input/output error"):
        scene.load(pace)
    assert scene.nothing_is_left()


@every_pace
@at_each_block
def test_file_that_ends_at_a_block(scene: Scene, pace: Pace, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv

    def end(fd: int, parts: list[memoryview], start: int) -> int:
        return 0 if start >= block * BLOCK_NBYTES else preadv(fd, parts, start)

    monkeypatch.setattr(os, "preadv", end)
    with pytest.raises(SourceChanged, match="was cut at byte"):
        scene.load(pace)
    assert scene.nothing_is_left()


@every_pace
@at_each_block
def test_file_that_changes_at_a_block(scene: Scene, pace: Pace, block: int) -> None:
    def touch(number: int) -> None:
        if number == block:
            checkpoints.touch(scene.path)

    scene.rung.before_write = touch
    with pytest.raises(SourceChanged, match="changed while it was being loaded"):
        scene.load(pace)
    assert scene.nothing_is_left()


@every_pace
@at_each_block
def test_load_that_is_cancelled_at_a_block(scene: Scene, pace: Pace, block: int) -> None:
    def cancel(done: int, total: int) -> None:
        if done >= block * BLOCK_NBYTES:
            raise LoadCancelled(f"at {done}")

    with pytest.raises(LoadCancelled):
        scene.load(pace, cancel)
    assert scene.nothing_is_left()


@every_pace
def test_memory_and_caller_that_fail_together_give_one_error(scene: Scene, pace: Pace) -> None:
    scene.rung.before_write = fail_at(3, OutOfSharedMemory("the device is full"))

    def cancel(done: int, total: int) -> None:
        if done >= 3 * BLOCK_NBYTES:
            raise LoadCancelled("unloaded")

    with pytest.raises((LoadCancelled, OutOfSharedMemory)):
        scene.load(pace, cancel)
    assert scene.nothing_is_left()


@every_pace
def test_staging_buffer_that_cannot_be_had_gives_the_others_back(scene: Scene, pace: Pace) -> None:
    scene.rung.before_staging = fail_at(1, SharedMemoryError("no page-locked memory left"))
    with pytest.raises(SharedMemoryError, match="page-locked"):
        scene.load(pace)
    assert scene.rung.ever_staged == 1
    assert scene.nothing_is_left()


@every_pace
def test_short_reads_are_gone_on_with(scene: Scene, pace: Pace, monkeypatch: pytest.MonkeyPatch) -> None:
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, start: preadv(fd, [parts[0][:7]], start))
    expected = loader.digest(scene.found, lambda done, total: None)
    loaded = loader.load(scene.found, plan(scene.found, ()), scene.rung, lambda done, total: None, pace)
    assert loaded.digest == expected
    loaded.segment.free()
    assert scene.nothing_is_left()


def test_memory_without_room_is_refused_before_a_byte_is_read(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    scene.rung.size = 1000

    def read(*arguments: object) -> int:
        pytest.fail("the file was read")

    monkeypatch.setattr(os, "preadv", read)
    with pytest.raises(OutOfSharedMemory, match="needed"):
        scene.load(PACES[0])
    assert scene.rung.ever_staged == 0
    assert scene.nothing_is_left()
