"""What a machine must offer, and what is left on it. Each check is one function; knows no host."""

from __future__ import annotations

import enum
import fcntl
import importlib
import os
import platform
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lunashm import paths, settings
from lunashm.cli.output import count, size
from lunashm.errors import LunashmError, SettingsError
from lunashm.memory.posix import PosixRung
from lunashm.paths import Endpoint

SHM = Path("/dev/shm")  # noqa: S108 - POSIX shared memory is there
_SMALL_SHM = 1 << 30
_PYTHON = (3, 11)
_TORCH = (2, 6)


class State(enum.Enum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True)
class Check:
    """``fix`` says what to do; only where something is to be done."""

    name: str
    state: State
    detail: str
    fix: str = ""


def machine() -> Iterator[Check]:
    """Everything that needs no host."""
    for name, check in (
        ("python", _python), ("torch", _torch), ("shared memory", _memory), (str(SHM), _shm),
        ("runtime directory", _runtime), ("pidfd", _pidfd), ("settings", _settings), ("leftovers", orphans),
    ):  # fmt: skip
        yield guarded(name, check)


def guarded(name: str, check: Callable[[], Check]) -> Check:
    """A check that fails in a way nobody thought of is a failed check, not a crash."""
    try:
        return check()
    except Exception as exc:  # noqa: BLE001 - named in the result
        fix = "" if isinstance(exc, LunashmError) else f"please report it: {type(exc).__name__}"
        return Check(name, State.FAIL, str(exc), fix)


def _python() -> Check:
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < _PYTHON:
        return Check("python", State.FAIL, text, "lunashm needs Python 3.11 or newer")
    return Check("python", State.OK, text)


def _torch() -> Check:
    try:
        version = str(importlib.import_module("torch").__version__)
    except (ImportError, OSError) as exc:
        return Check("torch", State.FAIL, f"cannot be imported: {exc}", f"{sys.executable} -m pip install torch")
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < _TORCH:
        return Check("torch", State.FAIL, version, "lunashm needs torch 2.6 or newer")
    return Check("torch", State.OK, version)


def _memory() -> Check:
    """Create, write, freeze, open and remove a real segment."""
    rung = PosixRung()
    segment = rung.allocate(4096)
    try:
        segment.write(0, b"lunashm")
        segment.freeze()
        same = bytes(rung.open(segment.export()).peek(0, 7)) == b"lunashm"
    finally:
        segment.free()
    if not same:
        return Check("shared memory", State.FAIL, "a mapping shows other bytes than were written", "see the kernel log")
    return Check("shared memory", State.OK, "created, mapped read-only and removed a segment")


def _shm() -> Check:
    room = os.statvfs(SHM)
    total, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    text = f"{size(free)} free of {size(total)}"
    if total < _SMALL_SHM:
        fix = f"models must fit in it: docker run --shm-size 16g, or: mount -o remount,size=16G {SHM}"
        return Check(str(SHM), State.WARN, text, fix)
    return Check(str(SHM), State.OK, text)


def _runtime() -> Check:
    """Ours, private, and short enough for a socket's path."""
    directory = paths.runtime_dir()
    Endpoint.for_device(settings.Settings().device)
    mode = stat.S_IMODE(directory.stat().st_mode)
    if not os.access(directory, os.W_OK | os.X_OK):
        return Check("runtime directory", State.FAIL, f"{directory} is not writable", f"chmod 700 {directory}")
    if not any(os.environ.get(name) for name in ("LUNASHM_RUNTIME_DIR", "XDG_RUNTIME_DIR")):
        text = f"{directory}: chosen because XDG_RUNTIME_DIR is not set here"
        fix = "where a process has it set, it looks elsewhere: give all of them the same LUNASHM_RUNTIME_DIR"
        return Check("runtime directory", State.WARN, text, fix)
    return Check("runtime directory", State.OK, f"{directory}, mode {mode:04o}")


def _pidfd() -> Check:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (OSError, AttributeError) as exc:
        fix = "needs Linux 5.3 and pidfd_open allowed by seccomp; else a killed client's lease ends only by time-out"
        return Check("pidfd", State.WARN, f"not available: {exc}", fix)
    return Check("pidfd", State.OK, "a killed client's lease ends at once")


def _settings() -> Check:
    try:
        path = settings.config_path()
        chosen = settings.load()
    except SettingsError as exc:
        return Check("settings", State.FAIL, exc.message, "correct it, or remove it to use the default")
    text = f"{path or 'no lunashm.toml'}; mode {chosen.mode}, device {chosen.device}"
    return Check("settings", State.OK, text)


def orphans() -> Check:
    """Segments that no live host owns: their shared lock is free."""
    found = {path.name: path.stat().st_size for path in SHM.glob(f"lunashm-{os.getuid()}-*") if _orphaned(path)}
    if found:
        text = f"{count(len(found), 'segment')} of a dead host, {size(sum(found.values()))}: {', '.join(sorted(found))}"
        return Check("leftovers", State.WARN, text, "the next lunashm serve removes them")
    return Check("leftovers", State.OK, "no segments of dead hosts")


def _orphaned(path: Path) -> bool:
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
