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


class Program:
    """Attached when it is started; ``checksum`` is what it saw then."""

    def __init__(self, host: HostProcess, path: Path, script: str) -> None:
        environment = os.environ | {"LUNASHM_RUNTIME_DIR": str(host.runtime), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + script, str(path)], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.checksum: str = self.hear()

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


@contextlib.contextmanager
def program(host: HostProcess, path: Path, script: str) -> Iterator[Program]:
    running = Program(host, path, script)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.communicate()
