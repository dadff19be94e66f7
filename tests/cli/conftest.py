"""Command lines run in this process, hosts and clients in real ones; nobody sees another's runtime directory."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lunashm.cli import run

from .terminal import Terminal

ROOT = Path(__file__).resolve().parents[2]
SERVE = ["-m", "lunashm", "serve", "--json"]
DEADLINE_S = 60
"""For what takes seconds on an idle machine; only a broken program reaches it."""


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON value on stdout; json refuses a second one."""
        return json.loads(self.out)


Cli = Callable[..., Result]


@pytest.fixture
def runtime() -> Iterator[Path]:
    """A directory with a path short enough for sockets, which pytest's own may not be."""
    path = Path(tempfile.mkdtemp(prefix="lunashm-cli-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    """`serve` sets up logging for its process; here it must not outlive the test, whose stderr is closed by then."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture(autouse=True)
def isolated(runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable, file or host of the developer's reaches a test."""
    for name in [name for name in os.environ if name.startswith("LUNASHM_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("LUNASHM_RUNTIME_DIR", str(runtime))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """``cli("ps", "--json")``: the whole command in this process."""

    def call(*arguments: str | Path) -> Result:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@dataclass
class Program:
    """A process of ours with its output in files, so that no full pipe can stop it."""

    command: list[str]
    runtime: Path
    log: Path = field(init=False)
    ready: str = ""

    def start(self) -> Program:
        """Run it and wait for its first line on stdout."""
        self.log = Path(tempfile.mkstemp(suffix=".log", dir=self.runtime)[1])
        environment = os.environ | {"LUNASHM_RUNTIME_DIR": str(self.runtime), "PYTHONPATH": str(ROOT)}
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, *self.command], env=environment, cwd=self.runtime, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
            )  # fmt: skip
        self.ready = self.process.stdout.readline()  # ends with the process at the latest
        if not self.ready:
            self.end()
            pytest.fail(f"{self.command} did not get ready:\n{self.log.read_text()}")
        return self

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it, unless it is gone, and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        self.process.stdin.close()
        try:
            return self.process.wait(DEADLINE_S)
        finally:
            self.process.kill()
            self.process.wait()
            self.process.stdout.close()


@pytest.fixture(scope="session")
def lent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """One host for all tests that only need some host; it starts slowly. Its endpoint is not the default one."""
    runtime = Path(tempfile.mkdtemp(prefix="lunashm-cli-"))
    (runtime / "models").mkdir()
    command = ["-m", "lunashm", "serve", "--json", "--root", str(runtime / "models")]
    host = Program([*command, "--endpoint", f"ipc://{runtime}/second.sock"], runtime).start()
    yield host
    code = host.end()
    log = host.log.read_text()
    shutil.rmtree(runtime)
    assert code == 0, log
    assert "Traceback" not in log


@pytest.fixture
def models(lent: Program, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Iterator[Path]:
    """The running host's root, empty; whatever was loaded is unloaded afterwards."""
    monkeypatch.setenv("LUNASHM_RUNTIME_DIR", str(lent.runtime))
    root = lent.runtime / "models"
    yield root
    for model in cli("ps", "--json").json["models"]:
        cli("unload", model["name"], "--force")
    for path in root.iterdir():
        path.unlink()


_seeds = iter(range(1 << 30))


def checkpoint(path: Path, tensors: int = 3, metadata: dict[str, str] | None = None) -> Path:
    """A small safetensors file of float32 whose bytes no other one has."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | (metadata or {})}
    for index in range(tensors):
        span = [64 * index, 64 * index + 64]
        header[f"layer{index}.weight"] = {"dtype": "F32", "shape": [4, 4], "data_offsets": span}
    text = json.dumps(header).encode()
    data = struct.pack("<f", next(_seeds)) * (16 * tensors)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def large(path: Path, nbytes: int = 40_000_000) -> Path:
    """A safetensors file of one tensor that is seen among what a process uses."""
    header = {"w": {"dtype": "F32", "shape": [nbytes // 4], "data_offsets": [0, nbytes]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\x01" * nbytes)
    return path


CLIENT = """
import sys, lunashm.client
with lunashm.client.attach(sys.argv[1], label="painter", endpoint=sys.argv[2]) as model:
    weights = model.state_dict()
    print(len(weights), flush=True)
    sys.stdin.read()
    del weights
"""


@pytest.fixture
def painter(lent: Program, models: Path) -> Iterator[Program]:
    """A client that holds painted.safetensors until its stdin closes."""
    path = checkpoint(models / "painted.safetensors")
    client = Program(["-c", CLIENT, str(path), f"ipc://{lent.runtime}/second.sock"], lent.runtime).start()
    yield client
    client.end()


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    """``terminal(runtime, "--interval", "0.1", columns=80)``: ``top`` on a terminal."""
    running: list[Terminal] = []

    def start(runtime: Path, *flags: str, **options: Any) -> Terminal:
        running.append(Terminal(runtime, *flags, **options))
        return running[-1]

    yield start
    for one in running:
        one.close()
