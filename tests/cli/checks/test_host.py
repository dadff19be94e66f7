"""Real hosts, and what the lock file of one would say that lives elsewhere."""

from __future__ import annotations

import msgspec
import pytest

from lunashm import paths, protocol
from lunashm.cli.checks import check, host
from lunashm.cli.checks.check import State, Wanted


def look(wanted=None):
    return {one.name: one for one in check.run(host.tasks(wanted or Wanted()))}


@pytest.fixture
def info(models, lent):
    (info,) = host.live().values()
    return info


def test_no_host_is_a_hint_with_the_command_to_start_one():
    assert look()["host"].fix == "start one with: lunashm serve"
    assert look(Wanted("cuda:1", only=True))["host"].fix.endswith("serve --device cuda:1")


def test_a_running_host_of_this_version_is_ok(models, lent):
    checks = look()
    assert {one.state for one in checks.values()} == {State.OK}
    assert f"pid {lent.process.pid}" in checks["host"].detail
    assert f"protocol {protocol.PROTOCOL_VERSION}" in checks["host"].detail
    assert "is in this PID namespace" in checks["host namespaces"].detail


def test_a_host_of_another_version_fails(models, lent, monkeypatch):
    monkeypatch.setattr(host, "__version__", "9.9.9")
    assert look()["host"].state is State.FAIL
    assert "9.9.9" in look()["host"].fix


def test_a_host_of_another_protocol_fails_with_the_reason(models, lent, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(protocol, "PROTOCOL_VERSION", 99)
        checks = look()
    assert checks["host"].state is State.FAIL
    assert "protocol" in checks["host"].detail
    assert checks["host namespaces"].state is State.OK, "it needs no answer"


def test_a_host_that_has_withdrawn_meanwhile_fails_with_the_reason(info):
    gone = paths.Endpoint.for_device("cpu")  # nobody is there
    (one,) = check.run(iter([check.Task("host", lambda: host.answers(gone, info))]))
    assert one.state is State.FAIL
    assert "no lunashm host" in one.detail


@pytest.mark.parametrize(
    ("rung", "device", "state"),
    [("posix", "cpu", State.WARN), ("cuda-ipc", "cpu", State.WARN), ("cuda-ipc", "cuda:0", State.FAIL)],
)
def test_a_host_in_another_pid_namespace_cannot_see_who_dies(info, rung, device, state):
    elsewhere = msgspec.structs.replace(info, pid_namespace=info.pid_namespace + 1, rung=rung)
    one = host.namespaces(elsewhere, Wanted(device))
    assert one.state is state
    assert "time-out" in one.detail
    assert "cuda-ipc is impossible" in one.detail
    assert "--pid host" in one.fix


def test_a_host_that_cannot_be_watched_is_a_warning(info, monkeypatch):
    monkeypatch.setattr(host.process, "pidfd_of", lambda pid, namespace: None)
    assert host.namespaces(info, Wanted()).state is State.WARN


def test_a_host_in_another_user_namespace_is_a_warning(info, tmp_path):
    for pid in (str(info.pid), "self"):
        (tmp_path / pid / "ns").mkdir(parents=True)
        (tmp_path / pid / "ns" / "user").touch()
    one = host.namespaces(info, Wanted(), tmp_path)
    assert one.state is State.WARN
    assert "user namespace" in one.detail
