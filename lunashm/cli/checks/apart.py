"""Checks in a process of their own: torch and NVIDIA's driver may hang, or end the process that asks them.

``python -m lunashm.cli.checks NOUN WANTED FD`` is the other process. It says which check it begins, then what came out,
one JSON value a line; when it ends in between, or says nothing for too long, that check has failed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from typing import IO

import msgspec

from lunashm.cli.checks.check import LIMIT_S, Check, State, Task, Wanted, overdue, result

_START_S = 30.0
"""Until the first word of the other process: Python starts and imports, from a cold disk."""


class _Line(msgspec.Struct, omit_defaults=True):
    """``begun``: the check of that name has begun, and must be over in ``limit_s``. ``check``: what came out."""

    begun: str = ""
    limit_s: float = LIMIT_S
    check: Check | None = None


def run(noun: str, wanted: Wanted) -> Iterator[Check]:
    """All checks of one noun, as they are made."""
    wish = msgspec.json.encode(wanted).decode()
    yield from follow(noun, [sys.executable, "-P", "-m", "lunashm.cli.checks", noun, wish])


def follow(name: str, command: list[str]) -> Iterator[Check]:
    """What ``command`` says about its checks; it gets one more argument, the descriptor to write to.

    It is gone afterwards, with all that it started. ``name`` is for what goes wrong before its first check.
    """
    reading, writing = os.pipe()
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(reading, lines), daemon=True).start()
    with tempfile.TemporaryFile() as errors:
        try:
            child = subprocess.Popen(
                [*command, str(writing)], pass_fds=[writing], process_group=0,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors,
            )  # fmt: skip
        finally:
            os.close(writing)
        try:
            yield from _checks(name, lines, child, errors)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: it ends when it can
                child.wait(1)


def _read(fd: int, lines: queue.SimpleQueue[bytes]) -> None:
    """Every whole line, and an empty one at the end."""
    with open(fd, "rb") as channel:
        for line in channel:
            if line.endswith(b"\n"):
                lines.put(line)
    lines.put(b"")


def _checks(
    name: str, lines: queue.SimpleQueue[bytes], child: subprocess.Popen[bytes], errors: IO[bytes]
) -> Iterator[Check]:
    limit_s, pending = _START_S, name
    while True:
        try:
            text = lines.get(timeout=limit_s)
        except queue.Empty:
            yield overdue(pending or name, limit_s)
            return
        if not text:
            break
        line = msgspec.json.decode(text, type=_Line)
        if line.check is None:
            limit_s, pending = line.limit_s, line.begun
        else:
            yield line.check
            limit_s, pending = _START_S, ""
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(LIMIT_S)
    if pending or child.returncode != 0:
        yield _ended(pending or name, child.returncode, errors)


def _ended(name: str, code: int | None, errors: IO[bytes]) -> Check:
    errors.seek(0)
    last = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
    how = f"signal {-code}" if code is not None and code < 0 else f"status {code}"
    text = f"the process that looked at it ended with {how}" + (f": {last}" if last else "")
    return Check(name, State.FAIL, text, f"please report it: {name}: {how}")


# -- the other process -------------------------------------------------------------------------------------------------


def main(noun: str, wanted: str, fd: str) -> None:
    with open(int(fd), "wb", buffering=0) as channel:
        os.set_inheritable(channel.fileno(), False)
        module = importlib.import_module(f"lunashm.cli.checks.{noun}")
        answer(module.tasks(msgspec.json.decode(wanted, type=Wanted)), channel)


def answer(tasks: Iterable[Task], channel: IO[bytes]) -> None:
    for task in tasks:
        channel.write(msgspec.json.encode(_Line(begun=task.name, limit_s=task.limit_s)) + b"\n")
        channel.write(msgspec.json.encode(_Line(check=result(task))) + b"\n")
