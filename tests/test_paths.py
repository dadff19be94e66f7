from __future__ import annotations

import os
import stat
from pathlib import Path

import msgspec
import pytest

from lunashm.errors import AlreadyServing, SettingsError
from lunashm.paths import Endpoint, HostLock, all_endpoints, find_host, nobody_at, runtime_dir
from tests.messages import HOST


@pytest.fixture
def endpoint(runtime: Path) -> Endpoint:
    return Endpoint.for_device("cpu")


# -- the runtime directory ---------------------------------------------------------------------------------------------


def test_runtime_directory_is_made_private(runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUNASHM_RUNTIME_DIR", str(runtime / "new" / "run"))
    assert stat.S_IMODE(runtime_dir().stat().st_mode) == 0o700
    (runtime / "new" / "run").chmod(0o755)
    assert stat.S_IMODE(runtime_dir().stat().st_mode) == 0o700


def test_relative_runtime_directory_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUNASHM_RUNTIME_DIR", "run")
    assert runtime_dir() == tmp_path / "run"


def test_runtime_directory_that_cannot_be_made_is_a_settings_error(
    runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (runtime / "file").touch()
    monkeypatch.setenv("LUNASHM_RUNTIME_DIR", str(runtime / "file"))
    with pytest.raises(SettingsError, match="LUNASHM_RUNTIME_DIR"):
        runtime_dir()


def test_runtime_directory_of_somebody_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 4711)
    with pytest.raises(SettingsError, match="uid"):
        runtime_dir()


# -- endpoints ---------------------------------------------------------------------------------------------------------


def test_endpoint_of_a_device_lies_in_the_runtime_directory(runtime: Path) -> None:
    endpoint = Endpoint.for_device("GPU-1/../x")
    assert endpoint.url == f"ipc://{runtime}/GPU-1____x.sock"
    assert endpoint.events == f"ipc://{runtime}/GPU-1____x.events.sock"
    assert endpoint.fds_path == runtime / "GPU-1____x.fds.sock"
    assert endpoint.lock_path == runtime / "GPU-1____x.lock"
    assert endpoint.socket_paths == (endpoint.socket_path, endpoint.events_path, endpoint.fds_path)


@pytest.mark.parametrize(
    ("device", "said"), [("cpu", "cpu"), ("GPU-7c6e1b0a-1", "GPU-7c6e1b0a-1"), ("studio", "")]
)  # fmt: skip
def test_endpoint_says_which_device_it_is_for(device: str, said: str) -> None:
    assert Endpoint.for_device(device).device == said


def test_who_finds_no_host_is_told_which_there_are_and_how_to_start_one(endpoint: Endpoint) -> None:
    missing = Endpoint.for_device("GPU-7c6e1b0a-1")
    assert str(nobody_at(missing)).endswith("start one with: lunashm serve --device GPU-7c6e1b0a-1")
    lock = HostLock(endpoint)
    lock.acquire()
    lock.publish(msgspec.structs.replace(HOST, device_name="cuda:1, NVIDIA H100"))
    try:
        assert ", there are hosts for cuda:1, NVIDIA H100 (--device cpu); start one with" in str(nobody_at(missing))
    finally:
        lock.release()
    assert str(nobody_at(endpoint)).endswith("cpu.sock; start one with: lunashm serve")


def test_one_endpoint_has_one_form() -> None:
    assert Endpoint.parse("ipc:///run/a") == Endpoint.parse("ipc:///run/a.sock")


@pytest.mark.parametrize("url", ["", "tcp://127.0.0.1:5555", "ipc://relative.sock", "ipc://@abstract", "/run/a.sock"])
def test_endpoint_that_is_no_absolute_ipc_path_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="ipc:///"):
        Endpoint.parse(url)


def test_path_too_long_for_a_socket_is_refused_with_the_sizes() -> None:
    longest = Endpoint.parse("ipc:///" + "a" * 94)
    assert max(len(str(path)) for path in longest.socket_paths) == 107
    with pytest.raises(SettingsError, match="108 bytes, Unix sockets allow 107"):
        Endpoint.parse("ipc:///" + "a" * 95)


def test_all_endpoints_are_those_that_a_host_ever_used(endpoint: Endpoint) -> None:
    assert all_endpoints() == []
    lock = HostLock(endpoint)
    lock.acquire()
    lock.release()
    assert all_endpoints() == [endpoint]


# -- the lock ----------------------------------------------------------------------------------------------------------


def test_host_is_found_from_publish_to_release(endpoint: Endpoint) -> None:
    lock = HostLock(endpoint)
    assert find_host(endpoint) is None
    lock.acquire()
    assert find_host(endpoint) is None  # it has not started to listen
    lock.publish(HOST)
    assert find_host(endpoint) == HOST
    lock.release()
    assert find_host(endpoint) is None
    lock.release()


def test_second_host_of_an_endpoint_is_told_who_has_it(endpoint: Endpoint) -> None:
    first, second = HostLock(endpoint), HostLock(endpoint)
    first.acquire()
    first.publish(HOST)
    with pytest.raises(AlreadyServing, match="pid 4242"):
        second.acquire(patience_s=0)
    first.release()
    second.acquire(patience_s=0)
    second.release()


def test_starting_host_is_not_taken_for_the_dead_one_before_it(endpoint: Endpoint) -> None:
    endpoint.lock_path.write_bytes(msgspec.json.encode(HOST))  # as SIGKILL leaves it
    assert find_host(endpoint) is None
    lock = HostLock(endpoint)
    lock.acquire()
    assert find_host(endpoint) is None
    lock.release()


def test_lock_file_of_an_unknown_kind_is_nobody(endpoint: Endpoint) -> None:
    lock = HostLock(endpoint)
    lock.acquire()
    endpoint.lock_path.write_bytes(b'{"pid": "many"}')
    assert find_host(endpoint) is None
    lock.release()


def test_lock_that_cannot_be_opened_is_a_settings_error(runtime: Path) -> None:
    (runtime / "x.lock").mkdir()
    with pytest.raises(SettingsError, match="lock file"):
        HostLock(Endpoint.parse(f"ipc://{runtime}/x.sock")).acquire()


def test_finding_a_host_leaves_no_descriptor_open(endpoint: Endpoint) -> None:
    lock = HostLock(endpoint)
    lock.acquire()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        find_host(endpoint)
    assert len(os.listdir("/proc/self/fd")) == before
    lock.release()
