from __future__ import annotations

from pathlib import Path

import pytest

from lunashm.memory import ram

GIB = 1 << 30


class Kernel:
    """/proc and /sys/fs/cgroup as files."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroups = root / "proc", root / "cgroup"
        self.write(self.proc / "meminfo", "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\n")  # 16 GiB

    def write(self, path: Path, text: str | int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def available(self) -> int:
        return ram.available(self.proc, self.cgroups)


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path)


def test_machine_without_cgroups_has_what_meminfo_says(kernel: Kernel) -> None:
    assert kernel.available() == 16 * GIB


def test_limit_of_a_container_counts_with_page_cache_as_free(kernel: Kernel) -> None:
    """cgroup v2 with a namespace of its own: the container's limits are at the root."""
    kernel.write(kernel.proc / "self" / "cgroup", "0::/")
    kernel.write(kernel.cgroups / "memory.max", 4 * GIB)
    kernel.write(kernel.cgroups / "memory.current", 3 * GIB)
    kernel.write(kernel.cgroups / "memory.stat", f"anon {GIB}\nshmem {GIB}\ninactive_file {GIB // 2}\nactive_file 0")
    assert kernel.available() == 3 * GIB // 2


def test_the_tightest_group_on_the_way_up_decides(kernel: Kernel) -> None:
    kernel.write(kernel.proc / "self" / "cgroup", "0::/user.slice/app")
    for group, limit in (("user.slice", 2 * GIB), ("user.slice/app", "max")):
        kernel.write(kernel.cgroups / group / "memory.max", limit)
        kernel.write(kernel.cgroups / group / "memory.current", GIB)
    assert kernel.available() == GIB


def test_cgroup_v1_limit_counts_too(kernel: Kernel) -> None:
    kernel.write(kernel.proc / "self" / "cgroup", "5:cpu,cpuacct:/\n4:memory:/box\n0::/")
    box = kernel.cgroups / "memory" / "box"
    kernel.write(box / "memory.limit_in_bytes", 4 * GIB)
    kernel.write(box / "memory.usage_in_bytes", 3 * GIB)
    kernel.write(box / "memory.stat", f"total_inactive_file {GIB}\ntotal_active_file {GIB}")
    assert kernel.available() == 3 * GIB


def test_the_tightest_limit_is_told_apart_from_what_it_leaves(kernel: Kernel) -> None:
    assert ram.limit(kernel.proc, kernel.cgroups) == ram.UNLIMITED
    kernel.write(kernel.proc / "self" / "cgroup", "4:memory:/box\n0::/")
    kernel.write(kernel.cgroups / "memory" / "memory.limit_in_bytes", 9223372036854771712)
    assert ram.limit(kernel.proc, kernel.cgroups) == ram.UNLIMITED
    kernel.write(kernel.cgroups / "memory" / "box" / "memory.limit_in_bytes", 4 * GIB)
    kernel.write(kernel.cgroups / "memory.max", 8 * GIB)
    assert ram.limit(kernel.proc, kernel.cgroups) == 4 * GIB


def test_no_limit_in_cgroup_v1_is_a_huge_number(kernel: Kernel) -> None:
    kernel.write(kernel.proc / "self" / "cgroup", "4:memory:/")
    kernel.write(kernel.cgroups / "memory" / "memory.limit_in_bytes", 9223372036854771712)
    kernel.write(kernel.cgroups / "memory" / "memory.usage_in_bytes", 3 * GIB)
    assert kernel.available() == 16 * GIB


def test_group_over_its_limit_leaves_nothing(kernel: Kernel) -> None:
    kernel.write(kernel.proc / "self" / "cgroup", "0::/")
    kernel.write(kernel.cgroups / "memory.max", GIB)
    kernel.write(kernel.cgroups / "memory.current", 2 * GIB)
    assert kernel.available() == 0


def test_kernel_that_says_nothing_sets_no_limit(tmp_path: Path) -> None:
    assert ram.available(tmp_path, tmp_path) == ram.UNLIMITED


def test_this_machine_has_an_answer() -> None:
    assert 0 < ram.available() < ram.UNLIMITED
