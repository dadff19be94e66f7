"""NVIDIA's multi-process service for the length of a measurement: started, and stopped again whatever happens.

Owns the daemon's pipe and log directories: private ones, so that no other daemon of the machine is met, and with short
names, as there are sockets in them. Needs no root where the GPU's compute mode is the default one. Without it, kernels
of several processes take turns on the GPU; with it, they run at the same time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

CONTROL = "nvidia-cuda-mps-control"
TIMEOUT_S = 30.0
QUIT_S = 5
"""How long the daemon waits for its servers before it ends them."""


class MpsUnavailable(Exception):
    """It cannot be used here; the message says why."""


class Mps:
    """Context manager; processes started with `environment` on top of their own use it."""

    def __init__(self, control: str = CONTROL) -> None:
        self._control = control
        self._folder = Path(tempfile.mkdtemp(prefix="lunashm-mps-"))
        self._pipe, self._log = self._folder / "pipe", self._folder / "log"
        self._running = False

    @property
    def environment(self) -> dict[str, str]:
        return {"CUDA_MPS_PIPE_DIRECTORY": str(self._pipe), "CUDA_MPS_LOG_DIRECTORY": str(self._log)}

    def __enter__(self) -> Self:
        """Raises MpsUnavailable."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _start(self) -> None:
        if shutil.which(self._control) is None:
            raise MpsUnavailable(f"{self._control} is not installed")
        self._pipe.mkdir()
        self._log.mkdir()
        done = self._run(["-d"], None)
        if done.returncode:
            raise MpsUnavailable(f"{self._control} -d ended with {done.returncode}: {self._words(done)}")
        self._running = True
        done = self._run([], "get_server_list\n")  # answers, so the daemon is there
        if done.returncode:
            raise MpsUnavailable(f"the daemon does not answer: {self._words(done)}")

    def servers(self) -> list[int]:
        """Pids of the servers that clients run through by now; none before the first client."""
        done = self._run([], "get_server_list\n")
        return [int(word) for word in done.stdout.split() if word.isdigit()] if done.returncode == 0 else []

    def close(self) -> None:
        """Stop the daemon, clients or not, and remove its directories. Safe to call twice."""
        if self._running:
            self._running = False
            with contextlib.suppress(MpsUnavailable):
                self._run([], f"quit -t {QUIT_S}\n")
            self._kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _kill(self) -> None:
        """A daemon that did not quit; its number is in a file of its own."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self._pipe / f"{Path(self._control).name}.pid").read_text())
            if CONTROL.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)

    def _run(self, arguments: list[str], said: str | None) -> subprocess.CompletedProcess[str]:
        """Its output goes to a file: a daemon that is born of it would keep a pipe open for ever."""
        with tempfile.TemporaryFile("w+") as heard:
            try:
                done = subprocess.run(
                    [self._control, *arguments], env=os.environ | self.environment, input=said,
                    stdin=subprocess.DEVNULL if said is None else None, stdout=heard, stderr=subprocess.STDOUT,
                    text=True, timeout=TIMEOUT_S, check=False,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as exc:
                raise MpsUnavailable(f"{self._control} {' '.join(arguments)}: {exc}") from exc
            heard.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, heard.read(), "")

    def _words(self, done: subprocess.CompletedProcess[str]) -> str:
        logs = [file.read_text(errors="replace")[-500:] for file in sorted(self._log.glob("*.log"))]
        return " ".join([done.stdout.strip(), *logs]).strip() or "it said nothing"
