from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from lunashm.cli.checks import check, memory
from lunashm.cli.checks.check import State, Wanted
from lunashm.memory import probe
from lunashm.memory.posix import PosixRung
from lunashm.memory.probe import Verdict

GOOD_VMM, BAD_VMM = Verdict("cuda-vmm", "", seconds=1.0), Verdict("cuda-vmm", "the driver said no")
BAD_IPC = Verdict("cuda-ipc", "the driver said no")


def test_both_rungs_in_ram_are_tried_by_a_round_trip():
    checks = {one.name: one for one in check.run(memory.tasks(Wanted()))}
    assert {checks[name].state for name in ("posix", "memfd")} == {State.OK}
    assert "round trip" in checks["memfd"].detail


def test_ram_is_skipped_where_only_a_gpu_is_looked_at():
    (only,) = check.run(memory.tasks(Wanted("cuda:1", only=True)))
    assert (only.state, only.detail) == (State.SKIP, "only cuda:1 is looked at")


@pytest.mark.parametrize(
    ("asked", "verdicts", "state", "said"),
    [
        ("", [GOOD_VMM], State.OK, "another process read"),
        ("auto", [GOOD_VMM, BAD_IPC], State.WARN, "cuda-vmm works, so nothing is missing"),
        ("auto", [BAD_VMM], State.WARN, "takes the next one"),
        ("", [BAD_VMM, BAD_IPC], State.WARN, "memory of cuda:0 cannot be shared"),
        ("auto", [BAD_VMM, BAD_IPC], State.FAIL, "memory of cuda:0 cannot be shared"),
        ("cuda-ipc", [GOOD_VMM, BAD_IPC], State.FAIL, "the driver said no"),
        ("cuda-vmm", [BAD_VMM], State.FAIL, "the driver said no"),
    ],
)
def test_one_rung_that_works_is_enough_unless_another_is_asked_for(asked, verdicts, state, said):
    one = memory.judge(asked, "cuda:0", verdicts, last=len(verdicts) == 2)
    assert (one.name, one.state) == (f"cuda:0 {verdicts[-1].rung}", state)
    assert said in one.detail
    assert state is not State.FAIL or one.fix.startswith(("lunashm serve --device cuda:0", "share in RAM instead"))


def test_a_small_dev_shm_is_a_problem_only_for_those_who_insist_on_it(monkeypatch):
    monkeypatch.setattr(probe, "shm_total", lambda: 64_000_000)
    assert memory.room(Wanted()).state is State.OK
    assert "lunashm serve takes memfd" in memory.room(Wanted()).detail
    insisting = memory.room(Wanted(memory="posix"))
    assert insisting.state is State.WARN
    assert "--shm-size" in insisting.fix


@pytest.fixture
def shm(monkeypatch):
    """A stand-in for /dev/shm on the same file system, so that other hosts' segments are not seen."""
    folder = Path("/dev/shm") / f"cli-test-{os.getpid()}"
    folder.mkdir()
    monkeypatch.setattr(memory, "SHM", folder)
    yield folder
    shutil.rmtree(folder)


def test_segments_that_nobody_locks_are_leftovers(shm):
    assert memory.leftovers().state is State.OK
    (shm / f"lunashm-{os.getuid()}-0123").write_bytes(b"12345")
    (shm / f"lunashm-{os.getuid()}-just-made").touch()
    (shm / f"lunashm-{os.getuid() + 1}-0123").write_bytes(b"someone else's")
    found = memory.leftovers()
    assert found.state is State.WARN
    assert "1 segment of a dead host, 5 B" in found.detail


def test_a_live_hosts_segment_is_no_leftover():
    segment = PosixRung().allocate(4096)
    try:
        for _ in ("writable", "frozen"):
            assert not memory.orphaned(Path("/dev/shm") / segment.name.lstrip("/"))
            segment.freeze()
    finally:
        segment.free()


def test_a_machine_without_dev_shm_is_told_how_to_mount_it(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "SHM", tmp_path / "shm")
    one = memory.room(Wanted())
    assert one.state is State.WARN
    assert one.fix.startswith("mount -t tmpfs")
