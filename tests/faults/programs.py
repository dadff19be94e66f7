"""Client processes: small scripts that say what they see, one JSON value a line, and do as they are told on stdin."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.host_process import ROOT, HostProcess

PRELUDE = """
import gc, json, os, signal, sys
import torch, lunashm.client
from lunashm import errors

def say(value):
    print(json.dumps(value), flush=True)

model = lunashm.client.attach(sys.argv[1])
weights = model.state_dict()
say(model.checksum())
"""


class Child:
    """A process that runs ``script`` with ``arguments``."""

    def __init__(self, runtime: Path, script: str, *arguments: str) -> None:
        environment = os.environ | {"LUNASHM_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, *arguments], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def hear(self) -> Any:
        """The next thing it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        return json.loads(line)

    def tell(self, line: str = "") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def end(self) -> int:
        """Its exit code, after all it does by itself; what it says on the way is dropped."""
        self.process.communicate()
        return self.process.returncode


class Program(Child):
    """Attached when it is started; ``checksum`` is what it saw then."""

    def __init__(self, host: HostProcess, path: Path, script: str) -> None:
        super().__init__(host.runtime, PRELUDE + script, str(path))
        self.checksum: str = self.hear()


@contextlib.contextmanager
def program(host: HostProcess, path: Path, script: str) -> Iterator[Program]:
    running = Program(host, path, script)
    with _ended(running):
        yield running


@contextlib.contextmanager
def child(runtime: Path, script: str, *arguments: str) -> Iterator[Child]:
    running = Child(runtime, script, *arguments)
    with _ended(running):
        yield running


@contextlib.contextmanager
def _ended(running: Child) -> Iterator[None]:
    try:
        yield
    finally:
        running.process.kill()
        running.process.communicate()
