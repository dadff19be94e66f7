"""What this user may: the runtime directory, open files, and seeing other processes."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterator
from pathlib import Path

from lunashm import paths
from lunashm.cli.checks.check import Check, State, Task
from lunashm.memory import CPU
from lunashm.paths import Endpoint

_FEW = 4096
"""Each client costs a host some five descriptors, each model that lies in no name one more."""
_HIDING = {"1": "noaccess", "2": "invisible", "4": "ptraceable"}
_ANY = 1 << 30


def tasks() -> Iterator[Task]:
    yield Task("runtime directory", runtime)
    yield Task("open files", lambda: files(*resource.getrlimit(resource.RLIMIT_NOFILE)))
    yield Task("pidfd", pidfd)
    yield Task("proc", proc)


def runtime() -> Check:
    """Ours, private, and short enough for a socket's path."""
    directory = paths.runtime_dir()
    Endpoint.for_device(CPU)
    mode = stat.S_IMODE(directory.stat().st_mode)
    if not os.access(directory, os.W_OK | os.X_OK):
        return Check("runtime directory", State.FAIL, f"{directory} is not writable", f"chmod 700 {directory}")
    if not any(os.environ.get(name) for name in ("LUNASHM_RUNTIME_DIR", "XDG_RUNTIME_DIR")):
        text = f"{directory}: chosen because XDG_RUNTIME_DIR is not set here"
        fix = "where a process has it set, it looks elsewhere: give all of them the same LUNASHM_RUNTIME_DIR"
        return Check("runtime directory", State.WARN, text, fix)
    return Check("runtime directory", State.OK, f"{directory}, mode {mode:04o}")


def files(soft: int, hard: int) -> Check:
    """A host raises its own limit as far as it may: the hard one is what counts."""
    most, now = (_ANY if limit == resource.RLIM_INFINITY else limit for limit in (hard, soft))
    text = f"{_number(now)}, a host may have {_number(most)}"
    if most < _FEW:
        fix = "docker run --ulimit nofile=65536:65536; systemd: LimitNOFILE=65536; else /etc/security/limits.conf"
        return Check("open files", State.WARN, text, fix)
    return Check("open files", State.OK, text)


def _number(limit: int) -> str:
    return "any number" if limit == _ANY else str(limit)


def pidfd() -> Check:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as exc:
        fix = "needs Linux 5.3 and pidfd_open allowed by seccomp; else a killed client's lease ends only by time-out"
        return Check("pidfd", State.WARN, f"not available: {exc}", fix)
    return Check("pidfd", State.OK, "a killed client's lease ends at once")


def proc(mounts: Path = Path("/proc/self/mounts")) -> Check:
    """Whether other processes of this user can be seen; those of other users do not matter."""
    options = ""
    for line in mounts.read_text().splitlines():
        _, place, kind, words, *_ = line.split()
        if (place, kind) == ("/proc", "proc"):
            options = words
    chosen = dict(word.partition("=")[::2] for word in options.split(","))
    hiding = chosen.get("hidepid", "")
    how = _HIDING.get(hiding, hiding)
    if how in ("", "0", "off"):
        return Check("proc", State.OK, "shows all processes")
    if how == "ptraceable":
        fix = "sudo mount -o remount,hidepid=invisible /proc"
        text = f"hidepid={how}: hosts may not see their clients, whose leases then end by time-out only"
        return Check("proc", State.WARN, text, fix)
    return Check("proc", State.OK, f"hidepid={how}: hides other users' processes, which lunashm does not need")
