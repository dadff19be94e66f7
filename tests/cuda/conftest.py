"""``lunashm serve --device cuda:N`` in a process of its own, and client processes that attach to it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.host_process import ROOT
from tests.standin.build import environment
from tests.standin.process import Died, Process

CLIENT = """
import ctypes, gc, os, torch
import lunashm.client, lunashm.client.session, lunashm.views
from safetensors.torch import load_file
from tests.standin import control

def tensor_at(mapping, offset, dtype, shape):
    # memory on the stand-in is memory of this machine, and torch here has no CUDA: the one thing that is replaced
    nbytes = dtype.itemsize * torch.Size(shape).numel()
    piece = mapping.at(offset, nbytes)
    window = (ctypes.c_char * nbytes).from_address(piece.pointer)
    window.piece = piece
    return torch.frombuffer(window, dtype=dtype).view(shape)

lunashm.views.tensor_at = tensor_at

gc.freeze()  # tests collect garbage often; what was imported by now is none

def attach(path, **options):
    return lunashm.client.attach(path, **options)

def same(attachment, path):
    file, mapped = load_file(path), attachment.state_dict()
    return file.keys() == mapped.keys() and all(torch.equal(file[name], mapped[name]) for name in file)
"""

LEAVE = """
model = again = layer = None
gc.collect()
for session in lunashm.client.session._sessions.values():
    session.close()
lunashm.client.session._sessions.clear()
assert control.live() == {}, control.live()
"""
"""Nothing of a test stays in a client; what its mappings took was given back."""


class GpuHost:
    """``variables``: of the stand-in's (LUNASHM_STANDIN_*), CUDA_VISIBLE_DEVICES and the like."""

    def __init__(self, runtime: Path, models: Path, *flags: str, **variables: str | None) -> None:
        self._log = runtime / f"host-{'-'.join(flags).replace('/', '_')}.log"
        self._variables = {"LUNASHM_RUNTIME_DIR": str(runtime), **variables}
        self._command = [sys.executable, "-m", "lunashm", "serve", "--json", "--root", str(models), *flags]
        self._process: subprocess.Popen[str] | None = None
        self.ready: dict[str, Any] = {}

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> dict[str, Any]:
        """What ``serve --json`` prints first: that it is ready, or the error it ends with."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=environment(**self._variables), cwd=ROOT,
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, self.log()
        self.ready = json.loads(line)
        return self.ready

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        """The exit code."""
        if self._process is None:
            return 0
        if self._process.poll() is None and "error" not in self.ready:
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(20)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return code

    def log(self) -> str:
        return self._log.read_text()

    def ask(self, *arguments: str) -> dict[str, Any]:
        """What ``lunashm ARGUMENTS --json`` prints, run with the host's own environment."""
        done = subprocess.run(
            [sys.executable, "-m", "lunashm", *arguments, "--json"], env=environment(**self._variables), cwd=ROOT,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.stdout, done.stderr
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


Serve = Callable[..., GpuHost]
Connect = Callable[..., Process]


@pytest.fixture
def models(runtime: Path) -> Path:
    folder = runtime / "models"
    folder.mkdir()
    return folder


@pytest.fixture
def serve(runtime: Path, models: Path) -> Iterator[Serve]:
    """Start a host with these flags; all are stopped at the end, and none may have stumbled."""
    hosts: list[GpuHost] = []

    def start(*flags: str, **variables: str | None) -> GpuHost:
        hosts.append(GpuHost(runtime, models, *flags, **variables))
        hosts[-1].start()
        return hosts[-1]

    yield start
    codes = [(host.stop(), host.log()) for host in hosts]
    for _, log in codes:
        assert "Traceback" not in log, log


def _client(**variables: str | None) -> Process:
    client = Process(**variables)
    client(CLIENT)
    return client


@pytest.fixture(scope="session")
def pool() -> Iterator[list[Process]]:
    """Clients that wait for a test: importing torch is what takes most of their time."""
    waiting: list[Process] = []
    yield waiting
    for client in waiting:
        client.__exit__()


@pytest.fixture
def connect(runtime: Path, pool: list[Process]) -> Iterator[Connect]:
    """A client process, with ``attach`` and ``same`` in it; one of its own for each call with ``variables``."""
    clients: list[Process] = []
    own: list[Process] = []

    def start(**variables: str | None) -> Process:
        if variables:
            own.append(_client(LUNASHM_RUNTIME_DIR=str(runtime), **variables))
            return own[-1]
        clients.append(pool.pop() if pool else _client())
        clients[-1](f"os.environ['LUNASHM_RUNTIME_DIR'] = {str(runtime)!r}")
        return clients[-1]

    yield start
    for client in own:
        client.__exit__()
    for client in clients:
        try:
            client(LEAVE)
            pool.append(client)
        except (Died, OSError):  # the test ended it
            client.__exit__()
