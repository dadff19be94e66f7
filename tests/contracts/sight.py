"""What a process can see of itself: open files, mapped segments, threads, libraries. Knows no rung."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

_MAPPED = re.compile(r" (/dev/shm/|/memfd:|/dev/nvidia)")


def counts() -> dict[str, int]:
    """What a leak would make grow. ``mapped``: lines of the memory map that belong to segments."""
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mapped": sum(bool(_MAPPED.search(line)) for line in _maps()),
        "threads": len(os.listdir("/proc/self/task")),
    }


def seen_by_a_child() -> list[str]:
    """The files that a child inherits from this process when nobody takes care, but for the standard ones."""
    command = ["ls", "-l", "/proc/self/fd"]
    listing = subprocess.run(command, close_fds=False, capture_output=True, text=True, check=True).stdout
    files = dict(re.findall(r" (\d+) -> (.+)", listing))
    return sorted(file for number, file in files.items() if int(number) > 2 and not file.startswith("/proc/"))


def libraries(name: str) -> list[str]:
    """The files of that name, whatever version, that are loaded here."""
    paths = {Path(line.split(maxsplit=5)[5]) for line in _maps() if name in line}
    return sorted(str(path) for path in paths if path.name.startswith(name))


def append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


def _maps() -> list[str]:
    return Path("/proc/self/maps").read_text().splitlines()
