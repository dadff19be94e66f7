"""Shared memory on the CPU: both rungs by a round trip, the room in /dev/shm, and what dead hosts left there."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lunashm.cli.checks.check import Check, State, Task, Wanted
from lunashm.cli.output import count, size
from lunashm.memory import CPU, probe

SHM = Path("/dev/shm")  # noqa: S108 - POSIX shared memory is there
PROBE_S = probe.TIMEOUT_S + 30
"""The round trip has a time-out of its own, which says more."""


def tasks(wanted: Wanted) -> Iterator[Task]:
    if wanted.only and wanted.on_gpu:
        yield Task("memory on CPU", lambda: Check("memory on CPU", State.SKIP, f"only {wanted.device} is looked at"))
        return
    yield from rungs(wanted.memory, CPU, "", configured=not wanted.on_gpu)
    yield Task(str(SHM), lambda: room(wanted))
    yield Task("leftovers", leftovers)


def rungs(memory: str, device: str, place: str, *, configured: bool) -> Iterator[Task]:
    """Each rung of ``device`` in the order in which a host tries them.

    ``place``: what people call a GPU, empty for the CPU. ``memory``: the rung that is configured, if ``device`` is.
    """
    names, _ = probe.candidates(device)
    verdicts: list[probe.Verdict] = []

    def look(rung: str) -> Check:
        verdicts.append(probe.probe(rung, device))
        asked = memory if configured else ""
        return judge(asked, place, verdicts, last=rung == names[-1])

    for rung in names:
        yield Task(f"{place} {rung}".strip(), partial(look, rung), PROBE_S)


def judge(asked: str, place: str, verdicts: list[probe.Verdict], *, last: bool) -> Check:
    """What the latest of ``verdicts`` on one device means: one rung that works is enough, unless another is asked for.

    ``asked``: the rung that is configured, ``auto``, or nothing where another device is.
    """
    verdict = verdicts[-1]
    name = f"{place} {verdict.rung}".strip()
    if verdict.works:
        return Check(name, State.OK, f"another process read what was written (round trip in {verdict.seconds:.1f} s)")
    text = f"does not work here: {verdict.reason}"
    working = [other.rung for other in verdicts if other.works]
    if asked == verdict.rung:
        other = working[0] if working else "auto"
        return Check(name, State.FAIL, text, f"lunashm serve --device {place or CPU} --memory {other}")
    if working:
        return Check(name, State.WARN, f"{text}; {working[0]} works, so nothing is missing")
    if not last:
        return Check(name, State.WARN, f"{text}; lunashm serve takes the next one that works")
    bad = State.FAIL if asked else State.WARN
    if place:
        fix = "share in RAM instead: lunashm serve --device cpu"
        return Check(name, bad, f"{text}; memory of {place} cannot be shared", fix)
    return Check(name, bad, f"{text}; memory cannot be shared", f"ls -ld {SHM}; dmesg | tail")


def room(wanted: Wanted) -> Check:
    """Small is no fault where a host may take memory without a name instead."""
    name = str(SHM)
    try:
        tmpfs = os.statvfs(SHM)
    except OSError as exc:
        return Check(name, State.WARN, f"cannot be used: {exc.strerror}", f"mount -t tmpfs -o size=16G shm {SHM}")
    text = f"{size(tmpfs.f_bavail * tmpfs.f_frsize)} free of {size(tmpfs.f_blocks * tmpfs.f_frsize)}"
    order, note = probe.candidates(CPU)
    if order[0] == "posix" or wanted.on_gpu:
        return Check(name, State.OK, text)
    if wanted.memory == "posix":
        fix = f"models must fit in it: docker run --shm-size 16g, or: mount -o remount,size=16G {SHM}"
        return Check(name, State.WARN, text, fix)
    return Check(name, State.OK, f"{text}; {note}, and lunashm serve takes {order[0]}")


def leftovers() -> Check:
    """Segments that no live host owns: their shared lock is free."""
    found = {path.name: path.stat().st_size for path in SHM.glob(f"lunashm-{os.getuid()}-*") if orphaned(path)}
    if found:
        text = f"{count(len(found), 'segment')} of a dead host, {size(sum(found.values()))}: {', '.join(sorted(found))}"
        return Check("leftovers", State.WARN, text, "the next lunashm serve removes them")
    return Check("leftovers", State.OK, "no segments of dead hosts")


def orphaned(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if os.fstat(fd).st_size == 0:
            return False  # being made right now: probing the lock would make its owner start over
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
