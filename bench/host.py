"""A real host in a process of its own, for benchmarks: started, waited for, stopped.

Owns the host's private runtime directory and its log. Nothing of the user's settings reaches it: endpoint, roots
and an empty configuration file are given.

    with HostProcess(roots=[models]) as host:
        lunashm.client.attach(file, endpoint=host.endpoint.url)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.checkpoints import ROOT
from lunashm.paths import Endpoint, find_host
from lunashm.protocol import HostInfo

POLL_S = 0.02


class HostFailed(Exception):
    """The host died or did not come up in time; the message ends with its log's tail."""


class HostProcess:
    """Context manager: serving on entry, gone (and its segments with it) on exit."""

    def __init__(
        self,
        *,
        roots: Sequence[str | Path],
        start_timeout_s: float = 60.0,
        stop_timeout_s: float = 15.0,
        device: str = "cpu",
        memory: str = "auto",
        mode: str = "force_daemon",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`mode`: the extension's, for clients that take `environment`; "auto" lets them load locally, and say why.

        `variables`: further ones of the host's own environment.
        """
        self.roots = [str(Path(root).resolve()) for root in roots]
        self.start_timeout_s, self.stop_timeout_s = start_timeout_s, stop_timeout_s
        self.device, self.memory = device, memory
        self.mode, self.variables = mode, dict(variables or {})
        self.runtime_dir = Path(tempfile.mkdtemp(prefix="lunashm-bench-"))
        weakref.finalize(self, shutil.rmtree, self.runtime_dir, True)  # runs after the process's own, made later
        self.endpoint = Endpoint.parse(f"ipc://{self.runtime_dir / 'host'}.sock")
        self.log = self.runtime_dir / "host.log"
        self._config = self.runtime_dir / "lunashm.toml"
        self._process: subprocess.Popen[bytes] | None = None
        self._info: HostInfo | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What makes a client come to this host, and to no other: by default one that cannot attach fails, loudly."""
        return {
            "LUNASHM_RUNTIME_DIR": str(self.runtime_dir),
            "LUNASHM_ENDPOINT": self.endpoint.url,
            "LUNASHM_CONFIG": str(self._config),
            "LUNASHM_DEVICE": self.device,
            "LUNASHM_MODE": self.mode,
        }

    @property
    def info(self) -> HostInfo:
        if self._info is None:
            raise HostFailed("the host has not been started")
        return self._info

    @property
    def pid(self) -> int:
        return self.info.pid

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> Self:
        """Start it and wait until clients can connect; stops it if that takes too long."""
        self._config.touch()
        command = [sys.executable, "-m", "lunashm", "serve", "--endpoint", self.endpoint.url]
        command += ["--device", self.device, "--memory", self.memory]
        for root in self.roots:
            command += ["--root", root]
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("LUNASHM_")}
        paths = [str(ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
        environment = inherited | self.variables | self.environment | {"PYTHONPATH": os.pathsep.join(paths)}
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self.runtime_dir, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        weakref.finalize(self, _end, self._process, self.stop_timeout_s)  # also when the interpreter exits
        deadline = time.monotonic() + self.start_timeout_s
        while (info := find_host(self.endpoint)) is None:
            if self._process.poll() is not None:
                raise self.failure(f"ended with status {self._process.returncode} before it was ready")
            if time.monotonic() > deadline:
                self.stop()
                raise self.failure(f"was not ready in {self.start_timeout_s:.0f} s")
            time.sleep(POLL_S)
        self._info = info
        return self

    def stop(self) -> None:
        """SIGTERM, then SIGKILL after `stop_timeout_s`. Safe to call twice."""
        if self._process is not None:
            _end(self._process, self.stop_timeout_s)

    def failure(self, what: str) -> HostFailed:
        tail = self.log.read_text(errors="replace")[-3000:] if self.log.exists() else ""
        return HostFailed(f"the host at {self.endpoint.url} {what}\n--- end of its log ---\n{tail}")


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    if process.poll() is None:
        process.kill()
        process.wait()
