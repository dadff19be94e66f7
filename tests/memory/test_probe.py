"""Which rung is taken is found out by a real second process; the stand-in driver's tests do the same on GPUs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lunashm.errors import SettingsError, SharedMemoryError
from lunashm.memory import probe, rung_for
from lunashm.memory.memfd import MemfdRung
from lunashm.memory.posix import PosixRung
from tests.conftest import segments


def test_auto_takes_posix_and_says_that_memfd_was_not_needed() -> None:
    choice = probe.choose("auto", "cpu")
    assert choice.rung is rung_for("posix", "cpu")
    assert [verdict.rung for verdict in choice.verdicts] == ["posix", "memfd"]
    assert "works (round trip in" in str(choice.verdicts[0])
    assert str(choice.verdicts[1]) == "memfd was not tried: it comes after the one that is taken"
    assert choice.fallback == ""


def test_auto_takes_memfd_where_shared_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that nobody gave a --shm-size."""
    monkeypatch.setattr(probe, "shm_total", lambda: 64 << 20)
    choice = probe.choose("auto", "cpu")
    assert choice.rung is rung_for("memfd", "cpu")
    assert "posix comes last here: /dev/shm may hold only 0.07 of" in choice.fallback


def test_auto_goes_on_where_a_rung_fails_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(rung: PosixRung, nbytes: int) -> None:
        raise SharedMemoryError("no /dev/shm here")

    monkeypatch.setattr(PosixRung, "allocate", refuse)
    choice = probe.choose("auto", "cpu")
    assert choice.rung.name == "memfd"
    assert choice.fallback == "posix does not work here: no /dev/shm here"


def test_rung_that_is_asked_for_and_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lunashm.memory.memfd.MemfdSegment.descriptor", lambda segment: None)
    with pytest.raises(SettingsError, match=r"memfd does not work here: another process could not use it.*descriptor"):
        probe.choose("memfd", "cpu")


def test_all_reasons_are_said_where_nothing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(rung: object, nbytes: int) -> None:
        raise SharedMemoryError(f"no {type(rung).__name__}")

    for rung in (PosixRung, MemfdRung):
        monkeypatch.setattr(rung, "allocate", refuse)
    with pytest.raises(SettingsError, match=r"no PosixRung; memfd does not work here: no MemfdRung"):
        probe.choose("auto", "cpu")


def test_other_bytes_than_were_written_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lunashm.memory.files.FileSegment.write", lambda *arguments: None)
    assert "read other bytes than were written" in probe.probe("posix", "cpu").reason


def test_other_process_that_cannot_start_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(probe.sys, "executable", "/bin/false")
    assert "ended with status 1" in probe.probe("posix", "cpu").reason


def test_other_process_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def hang(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        started.append(popen(["sleep", "100"], **options))  # type: ignore[call-overload]
        return started[-1]

    monkeypatch.setattr(probe.subprocess, "Popen", hang)
    monkeypatch.setattr(probe, "TIMEOUT_S", 0.2)
    assert "did not manage to map it within 0.2 s" in probe.probe("posix", "cpu").reason
    assert started[0].poll() is not None


@pytest.mark.parametrize("name", ["posix", "memfd"])
def test_probing_leaves_nothing(name: str) -> None:
    before, descriptors = segments(), len(os.listdir("/proc/self/fd"))
    assert probe.probe(name, "cpu").works
    assert segments() <= before
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize("memory", ["cuda-vmm", "cuda-ipc"])
def test_kind_of_memory_that_the_device_does_not_have_is_refused(memory: str) -> None:
    with pytest.raises(SettingsError, match=f"'{memory}' is a GPU's, and the device is cpu: .*--device cuda:0.*auto"):
        probe.choose(memory, "cpu")


def test_files_of_the_working_directory_are_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The other process starts where the host was started, whatever lies there."""
    (tmp_path / "re.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)
    assert probe.probe("memfd", "cpu").works
