"""How much RAM this process may still take. Knows the kernel's accounts (meminfo, cgroup v1 and v2), nothing else.

tmpfs pages are RAM and count against the memory cgroup of whoever writes them: in a container with a memory limit,
writing past that limit gets the writer killed, however large /dev/shm claims to be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 1 << 62

_V1_UNLIMITED = 1 << 60
"""cgroup v1 says "no limit" with a page-aligned 2**63."""


def available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes: the machine's MemAvailable, or less where a cgroup leaves less."""
    return max(0, min(_machine(proc), _cgroup(proc, cgroups)))


def total(proc: Path = Path("/proc")) -> int:
    """Bytes of RAM that the machine has; what a cgroup leaves of it is :func:`available`'s business."""
    return _meminfo(proc, "MemTotal:")


def limit(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that the tightest memory cgroup above us allows for all in it; UNLIMITED where none is limited."""
    limits = (_number(level / names[0]) for level, names in _groups(proc, cgroups))
    found = [number for number in limits if number is not None and number < _V1_UNLIMITED]
    return min(found, default=UNLIMITED)


def _machine(proc: Path) -> int:
    return _meminfo(proc, "MemAvailable:")


def _meminfo(proc: Path, entry: str) -> int:
    for line in _lines(proc / "meminfo"):
        if line.startswith(entry):
            return int(line.split()[1]) * 1024
    return UNLIMITED


def _cgroup(proc: Path, cgroups: Path) -> int:
    """The least that any memory cgroup above us leaves; page cache counts as free, tmpfs does not."""
    return min((_room_in(level, *names) for level, names in _groups(proc, cgroups)), default=UNLIMITED)


def _groups(proc: Path, cgroups: Path) -> Iterator[tuple[Path, tuple[str, str, tuple[str, str]]]]:
    """Our memory cgroups from the innermost up, with what their accounts are called: limit, usage, page cache."""
    for line in _lines(proc / "self" / "cgroup"):
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0":
            root, names = cgroups, ("memory.max", "memory.current", ("inactive_file", "active_file"))
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
        else:
            continue
        group = root / path.strip("/")
        for level in (group, *group.parents):
            yield level, names
            if level == root:
                break


def _room_in(group: Path, limit_name: str, usage_name: str, cache_names: tuple[str, ...]) -> int:
    limit, usage = _number(group / limit_name), _number(group / usage_name)
    if limit is None or usage is None or limit >= _V1_UNLIMITED:
        return UNLIMITED
    stat = dict(line.split(maxsplit=1) for line in _lines(group / "memory.stat"))
    return limit - usage + sum(int(stat.get(name, "0")) for name in cache_names)


def _number(path: Path) -> int | None:
    """None where there is no such account, or it says ``max``."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
