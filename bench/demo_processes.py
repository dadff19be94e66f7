"""The demo's processes: one host, some clients, each in a session of its own, all gone when the demo ends.

Owns starting, waiting with a deadline, and ending; knows nothing of models or memory.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.demo_model import DemoError
from lunashm.memory.posix import PosixRung

ROOT = Path(__file__).resolve().parent.parent
HOST_START_S = 60.0
CLIENT_S = 600.0
END_S = 20.0


def environment(folder: Path) -> dict[str, str]:
    """This process's, without any lunashm setting of the user's, and with this source tree's packages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LUNASHM_")}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "LUNASHM_RUNTIME_DIR": str(folder)}
    config = folder / "lunashm.toml"
    config.touch()
    return kept | own | {"LUNASHM_CONFIG": str(config), "HF_HUB_OFFLINE": "1"}


class Child:
    """A Python module in a process of its own; what it says on stderr is kept for the error that may need it."""

    def __init__(self, arguments: Sequence[str], folder: Path, name: str) -> None:
        self.name = name
        self.log = folder / f"{name.replace(' ', '-')}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *arguments], cwd=folder, env=environment(folder), start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        self._read = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self, timeout_s: float) -> dict[str, Any]:
        """The JSON line it prints when it is ready. Raises DemoError when it ends first, or takes too long."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout_s
        pipe = self.process.stdout.fileno()
        while b"\n" not in self._read:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                raise self.failure(f"was not ready after {timeout_s:.0f} s")
            chunk = os.read(pipe, 1 << 16)
            if not chunk:
                raise self.failure("ended")
            self._read += chunk
        return dict(json.loads(self._read.partition(b"\n")[0]))

    def failure(self, what: str) -> DemoError:
        tail = self.log.read_text(errors="replace")[-3000:].strip()
        return DemoError(f"the {self.name} {what}\n{tail}" if tail else f"the {self.name} {what}")

    def release(self, number: signal.Signals | None = None) -> None:
        """Tell it to end, by closing its stdin or by a signal, and do not wait."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        if number is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def end(self, number: signal.Signals | None = None) -> None:
        """Tell it to end and wait; SIGKILL when it does not listen."""
        assert self.process.stdout is not None
        self.release(number)
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


def run(arguments: Sequence[str], folder: Path, name: str, timeout_s: float = CLIENT_S) -> str:
    """A module that runs to its end; returns what it printed. Raises DemoError with what it complained of."""
    command = [sys.executable, "-m", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment(folder), start_new_session=True, capture_output=True, text=True,
            timeout=timeout_s, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as exc:
        raise DemoError(f"{name} took more than {timeout_s:.0f} s") from exc
    if done.returncode:
        raise DemoError(f"{name} failed (exit {done.returncode})\n{done.stderr[-3000:].strip()}")
    return done.stdout


@contextlib.contextmanager
def host(folder: Path, root: Path) -> Iterator[tuple[Child, str]]:
    """A real ``lunashm serve`` on an endpoint of its own; yields it and the endpoint's URL."""
    url = f"ipc://{folder}/demo.sock"
    flags = ["--endpoint", url, "--root", str(root), "--device", "cpu", "--log-level", "WARNING", "--json"]
    child = Child(["lunashm", "serve", *flags], folder, "host")
    try:
        child.line(HOST_START_S)
        yield child, url
    finally:
        child.end(signal.SIGTERM)
        if child.process.returncode != 0:  # killed: nobody else would give its memory back before the next host
            PosixRung().reclaim()


@contextlib.contextmanager
def clients(ways: Sequence[Sequence[str]], folder: Path, name: str) -> Iterator[list[Child]]:
    """One client for each list of arguments, all at once."""
    children: list[Child] = []
    try:
        for number, arguments in enumerate(ways, 1):
            children.append(Child(["bench.demo_client", *arguments], folder, f"{name} client {number}"))
        yield children
    except BaseException:
        for child in children:
            child.release(signal.SIGTERM)
        raise
    finally:
        for child in children:
            child.release()
        for child in children:
            child.end()
