from __future__ import annotations

import os

import pytest

from lunashm.cli.checks import check, container
from lunashm.cli.checks.check import State, Wanted
from lunashm.cli.checks.container import Kernel

GIB = 1 << 30


@pytest.fixture
def kernel(tmp_path):
    """A machine of 32 GiB, 16 of them free, whose files a test adds to."""
    kernel = Kernel(tmp_path, {})
    put(kernel, "proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB")
    put(kernel, "proc/self/cgroup", "0::/box")
    put(kernel, "proc/self/uid_map", "         0          0 4294967295")
    put(kernel, "proc/sys/kernel/osrelease", "6.8.0-generic")
    return kernel


def put(kernel, path, text):
    (kernel.root / path).parent.mkdir(parents=True, exist_ok=True)
    (kernel.root / path).write_text(f"{text}\n")


def test_this_machine_has_no_failure():
    states = {one.name: one.state for one in check.run(container.tasks(Wanted()))}
    assert State.FAIL not in states.values()
    assert list(states) == ["system", "container", "memory limit", "process limit", "user namespace"]


def test_a_plain_machine_has_nothing_to_say(kernel):
    assert container.system(kernel, Wanted()).detail.endswith("6.8.0-generic, not WSL2")
    assert container.container(kernel).detail == "none"
    assert container.memory(kernel).detail == "none below the 34.4 GB of RAM; 17.2 GB free"
    assert container.processes(kernel).detail == "none in a cgroup"
    assert container.users(kernel).detail == "the machine's own"


@pytest.mark.parametrize(("device", "state"), [("cpu", State.OK), ("cuda:0", State.WARN)])
def test_wsl2_is_recognised_and_matters_on_a_gpu(kernel, device, state):
    put(kernel, "proc/sys/kernel/osrelease", "5.15.153.1-microsoft-standard-WSL2")
    one = container.system(kernel, Wanted(device))
    assert one.state is state
    assert "WSL2: it has no CUDA IPC" in one.detail


@pytest.mark.parametrize(
    ("path", "text", "kind"),
    [
        (".dockerenv", "", "docker"),
        ("run/.containerenv", "", "podman"),
        ("proc/1/cgroup", "0::/kubepods/burstable/pod1", "kubernetes"),
        ("proc/self/cgroup", "4:memory:/docker/0123", "docker"),
    ],
)
def test_containers_are_recognised_by_what_they_leave(kernel, path, text, kind):
    put(kernel, path, text)
    assert container.container(kernel).detail.startswith(f"{kind};")


def test_containers_are_recognised_by_variables(kernel):
    assert container.container(Kernel(kernel.root, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"})).detail[:4] == "kube"
    assert container.container(Kernel(kernel.root, {"container": "lxc"})).detail.startswith("lxc;")


@pytest.mark.parametrize(("limit", "state"), [(8 * GIB, State.OK), (2 * GIB, State.WARN)])
def test_a_containers_memory_limit_is_held_against_ram(kernel, limit, state):
    put(kernel, "sys/fs/cgroup/box/memory.max", limit)
    put(kernel, "sys/fs/cgroup/box/memory.current", 0)
    one = container.memory(kernel)
    assert one.state is state
    assert one.detail.startswith(f"cgroup limit {limit / 1e9:.2f} GB of 34.4 GB of RAM")
    assert ("docker run --memory" in one.fix) == (state is State.WARN)


def test_a_machine_without_free_memory_is_not_told_about_docker(kernel):
    put(kernel, "proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable: 1000000 kB")
    one = container.memory(kernel)
    assert one.state is State.WARN
    assert "docker" not in one.fix


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("used", "state"), [(10, State.OK), (990, State.WARN)])
def test_the_tightest_process_limit_counts(kernel, version, used, state):
    root = "sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/pids"
    put(kernel, "proc/self/cgroup", "0::/a/b" if version == 2 else "8:pids:/a/b\n0::/")
    for group, most, now in (("a", 1000, used), ("a/b", "max", 5), ("", "max", 400)):
        put(kernel, f"{root}/{group}/pids.max", most)
        put(kernel, f"{root}/{group}/pids.current", now)
    one = container.processes(kernel)
    assert (one.state, one.detail) == (state, f"1000 processes and threads, {used} in use")
    assert ("--pids-limit" in one.fix) == (state is State.WARN)


def test_a_user_namespace_says_who_we_are_outside(kernel):
    uid = os.getuid()
    put(kernel, "proc/self/uid_map", f"{uid} 1000 1\n{uid + 1} 100000 65536")
    assert f"uid {uid} here is uid 1000 outside" in container.users(kernel).detail
