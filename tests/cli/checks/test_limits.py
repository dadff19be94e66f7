from __future__ import annotations

import os
import resource

import pytest

from lunashm.cli.checks import check, limits
from lunashm.cli.checks.check import State


def test_this_machine_has_no_failure():
    states = {one.name: one.state for one in check.run(limits.tasks())}
    assert State.FAIL not in states.values()
    assert states["runtime directory"] is State.OK


def test_a_runtime_directory_too_deep_for_sockets_fails(tmp_path, monkeypatch):
    monkeypatch.setenv("LUNASHM_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    (runtime, *_) = check.run(limits.tasks())
    assert runtime.state is State.FAIL
    assert "LUNASHM_RUNTIME_DIR" in runtime.detail


def test_a_runtime_directory_that_others_may_not_find_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.delenv("LUNASHM_RUNTIME_DIR")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(limits.paths, "runtime_dir", lambda: tmp_path)
    monkeypatch.setattr(limits.Endpoint, "for_device", lambda device: None)
    one = limits.runtime()
    assert one.state is State.WARN
    assert "LUNASHM_RUNTIME_DIR" in one.fix


@pytest.mark.parametrize(
    ("soft", "hard", "state"),
    [
        (1024, 1 << 20, State.OK),  # a host raises its own
        (1024, 1024, State.WARN),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, State.OK),
    ],
)
def test_the_hard_limit_of_open_files_is_what_counts(soft, hard, state):
    one = limits.files(soft, hard)
    assert one.state is state
    assert ("--ulimit nofile" in one.fix) == (state is State.WARN)


def test_without_pidfd_leases_end_by_time_out(monkeypatch):
    def refused(pid):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "pidfd_open", refused)
    one = limits.pidfd()
    assert one.state is State.WARN
    assert "time-out" in one.fix


@pytest.mark.parametrize(
    ("options", "state", "said"),
    [
        ("rw,relatime", State.OK, "shows all processes"),
        ("rw,hidepid=2", State.OK, "hidepid=invisible: hides other users'"),
        ("rw,hidepid=noaccess,gid=5", State.OK, "hidepid=noaccess"),
        ("rw,hidepid=4", State.WARN, "hidepid=ptraceable"),
    ],
)
def test_processes_that_proc_hides(tmp_path, options, state, said):
    mounts = tmp_path / "mounts"
    mounts.write_text(f"tmpfs / tmpfs rw 0 0\nproc /proc proc {options} 0 0\nproc /elsewhere/proc proc hidepid=4 0 0\n")
    one = limits.proc(mounts)
    assert one.state is state
    assert said in one.detail
