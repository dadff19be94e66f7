"""What this system is, and what a container takes away: WSL2, memory and process limits, ids of its own.

All of it is in /proc and cgroups, whose places are arguments.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lunashm.cli.checks.check import Check, State, Task, Wanted
from lunashm.cli.output import size
from lunashm.memory import ram

_SMALL = 4_000_000_000
"""Bytes: less than one model of today with what its loader needs."""
_FEW = 64
"""Threads that a host, its readers and a probe may need at once."""

_SIGNS = {".dockerenv": "docker", "run/.containerenv": "podman", "run/systemd/container": "systemd-nspawn"}
_GROUPS = {"kubepods": "kubernetes", "docker": "docker", "libpod": "podman", "containerd": "containerd", "lxc": "lxc"}


@dataclass(frozen=True)
class Kernel:
    """Where the kernel's accounts are."""

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    @property
    def proc(self) -> Path:
        return self.root / "proc"

    @property
    def cgroups(self) -> Path:
        return self.root / "sys" / "fs" / "cgroup"

    def read(self, path: str) -> str:
        """Empty where there is no such file."""
        try:
            return (self.root / path).read_text(errors="replace").strip()
        except OSError:
            return ""


def tasks(wanted: Wanted) -> Iterator[Task]:
    kernel = Kernel()
    yield Task("system", lambda: system(kernel, wanted))
    yield Task("container", lambda: container(kernel))
    yield Task("memory limit", lambda: memory(kernel))
    yield Task("process limit", lambda: processes(kernel))
    yield Task("user namespace", lambda: users(kernel))


def system(kernel: Kernel, wanted: Wanted) -> Check:
    release = kernel.read("proc/sys/kernel/osrelease")
    text = f"{platform.system()} {release or platform.release()}"
    if "microsoft" not in release.lower():
        return Check("system", State.OK, f"{text}, not WSL2")
    text = f"{text}, WSL2: it has no CUDA IPC, and its RAM is a part of Windows'"
    if wanted.on_gpu:
        fix = "if no rung of the GPU works, share in RAM: lunashm serve --device cpu"
        return Check("system", State.WARN, text, fix)
    return Check("system", State.OK, text)


def container(kernel: Kernel) -> Check:
    kind = _kind(kernel)
    if not kind:
        return Check("container", State.OK, "none")
    text = f"{kind}; hosts and clients elsewhere meet only in a runtime directory, and for posix a /dev/shm, of both"
    return Check("container", State.OK, text)


def _kind(kernel: Kernel) -> str:
    if kernel.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    for sign, kind in _SIGNS.items():
        if (kernel.root / sign).exists():
            return kind
    groups = kernel.read("proc/1/cgroup") + kernel.read("proc/self/cgroup")
    named = next((kind for sign, kind in _GROUPS.items() if sign in groups), "")
    return named or kernel.environ.get("container", "")


def memory(kernel: Kernel) -> Check:
    """Shared models count against the cgroup that loads them, wherever they lie in RAM."""
    name = "memory limit"
    total, limit = ram.total(kernel.proc), ram.limit(kernel.proc, kernel.cgroups)
    free = ram.available(kernel.proc, kernel.cgroups)
    bound = f"cgroup limit {size(limit)} of" if limit < total else "none below the"
    text = f"{bound} {size(total)} of RAM; {size(free)} free"
    if free >= _SMALL:
        return Check(name, State.OK, text)
    if limit < total:
        fix = "docker run --memory 32g; systemd: MemoryMax=32G; kubernetes: resources.limits.memory"
        return Check(name, State.WARN, f"{text}: models must fit in it", fix)
    return Check(name, State.WARN, f"{text}: models must fit in it", "free -h; close what else uses memory")


def processes(kernel: Kernel) -> Check:
    """Linux counts threads as processes, and a host loads with many."""
    limits = list(_process_limits(kernel))
    if not limits:
        return Check("process limit", State.OK, "none in a cgroup")
    most, now = min(limits, key=lambda limit: limit[0] - limit[1])
    text = f"{most} processes and threads, {now} in use"
    if most - now < _FEW:
        return Check("process limit", State.WARN, text, "docker run --pids-limit 1024; systemd: TasksMax=1024")
    return Check("process limit", State.OK, text)


def _process_limits(kernel: Kernel) -> Iterator[tuple[int, int]]:
    """Limit and use of every group above us, cgroup v1 and v2."""
    for line in kernel.read("proc/self/cgroup").splitlines():
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy != "0" and "pids" not in controllers.split(","):
            continue
        root = Path("sys/fs/cgroup") / ("" if hierarchy == "0" else "pids")
        group = root / path.strip("/")
        for level in (group, *group.parents):
            most, now = kernel.read(f"{level}/pids.max"), kernel.read(f"{level}/pids.current")
            if most.isdigit() and now.isdigit():
                yield int(most), int(now)
            if level == root:
                break


def users(kernel: Kernel) -> Check:
    """Host and clients must be one user to each other: files and sockets are checked by uid."""
    name = "user namespace"
    spans = [tuple(map(int, line.split())) for line in kernel.read("proc/self/uid_map").splitlines()]
    if not spans or spans == [(0, 0, 4294967295)]:
        return Check(name, State.OK, "the machine's own")
    uid = os.getuid()
    outside = next((there + uid - here for here, there, length in spans if here <= uid < here + length), None)
    text = f"one of its own: uid {uid} here is uid {outside} outside; hosts and clients must be the same user"
    return Check(name, State.OK, text)
