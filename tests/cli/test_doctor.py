from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from lunashm import protocol
from lunashm.cli import doctor, machine
from lunashm.cli.machine import State
from lunashm.memory.posix import PosixRung


def test_a_healthy_machine_without_a_host_passes_with_a_hint(cli):
    result = cli("doctor", "--json")
    states = {check["name"]: check["state"] for check in result.json["checks"]}
    assert states.pop("/dev/shm") in ("ok", "warn")
    assert states.pop("leftovers") in ("ok", "warn")
    assert states.pop("host") == "warn"
    assert set(states.values()) == {"ok"}
    assert (result.code, result.json["ok"]) == (0, True)
    assert "-> start one with: lunashm serve" in cli("doctor").out


def test_a_running_host_of_this_version_is_ok(cli, models, lent):
    (host,) = [check for check in cli("doctor", "--json").json["checks"] if check["name"] == "host"]
    assert host["state"] == "ok"
    assert f"pid {lent.process.pid}" in host["detail"]


def test_a_host_of_another_version_fails(cli, models, monkeypatch):
    monkeypatch.setattr(doctor, "__version__", "9.9.9")
    result = cli("doctor", "--json")
    (host,) = [check for check in result.json["checks"] if check["name"] == "host"]
    assert (result.code, host["state"]) == (1, "fail")
    assert "9.9.9" in host["fix"]


def test_a_host_of_another_protocol_fails_with_the_reason(cli, models, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "PROTOCOL_VERSION", 99)
        checks = cli("doctor", "--json").json["checks"]
    (host,) = [check for check in checks if check["name"] == "host"]
    assert host["state"] == "fail"
    assert "protocol" in host["detail"]


def test_settings_that_do_not_parse_fail_and_nothing_else_does(cli, tmp_path):
    (tmp_path / "lunashm.toml").write_text("mode = 'sometimes'")
    failed = [check for check in cli("doctor", "--json").json["checks"] if check["state"] == "fail"]
    assert [check["name"] for check in failed] == ["settings"]
    assert "lunashm.toml" in failed[0]["detail"]


def test_a_runtime_directory_too_deep_for_sockets_fails(cli, tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    monkeypatch.setenv("LUNASHM_RUNTIME_DIR", str(deep))
    (check,) = [check for check in cli("doctor", "--json").json["checks"] if check["name"] == "runtime directory"]
    assert check["state"] == "fail"
    assert "LUNASHM_RUNTIME_DIR" in check["detail"]


def test_a_runtime_directory_that_others_may_not_find_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.delenv("LUNASHM_RUNTIME_DIR")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(machine.paths, "runtime_dir", lambda: tmp_path)
    monkeypatch.setattr(machine.Endpoint, "for_device", lambda device: None)
    check = machine._runtime()
    assert check.state is State.WARN
    assert "LUNASHM_RUNTIME_DIR" in check.fix


def test_torch_that_cannot_be_imported_fails_with_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    check = machine._torch()
    assert check.state is State.FAIL
    assert "pip install torch" in check.fix


def test_a_check_that_fails_unforeseen_is_a_failed_check():
    def broken():
        raise ZeroDivisionError("boo")

    check = machine.guarded("x", broken)
    assert (check.state, check.detail) == (State.FAIL, "boo")
    assert "ZeroDivisionError" in check.fix


@pytest.fixture
def shm(monkeypatch):
    """A stand-in for /dev/shm on the same file system, so that other hosts' segments are not seen."""
    folder = Path("/dev/shm") / f"cli-test-{os.getpid()}"
    folder.mkdir()
    monkeypatch.setattr(machine, "SHM", folder)
    yield folder
    shutil.rmtree(folder)


def test_segments_that_nobody_locks_are_leftovers(shm):
    assert machine.orphans().state is State.OK
    (shm / f"lunashm-{os.getuid()}-0123").write_bytes(b"12345")
    (shm / f"lunashm-{os.getuid()}-just-made").touch()
    (shm / f"lunashm-{os.getuid() + 1}-0123").write_bytes(b"someone else's")
    check = machine.orphans()
    assert check.state is State.WARN
    assert "1 segment of a dead host, 5 B" in check.detail


def test_a_live_hosts_segment_is_no_leftover():
    segment = PosixRung().allocate(4096)
    try:
        for _ in ("writable", "frozen"):
            assert not machine._orphaned(Path("/dev/shm") / segment.name.lstrip("/"))
            segment.freeze()
    finally:
        segment.free()
