"""Client processes with torch on a GPU: they say what they see, one JSON value a line, and go on when they are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any, Self

import msgspec
import pytest

from tests.contracts.remote import RemoteSegment
from tests.contracts.rungs import PYTHON_PATH, ROOT

ANSWER_S = 120.0
"""torch and a context take seconds to start; only a client that hangs takes this long."""


class Program:
    """``python -m tests.gpu.client WHAT`` with one segment mapped. Ends with its context."""

    def __init__(self, what: str, segment: RemoteSegment, environment: dict[str, str]) -> None:
        descriptor = segment.descriptor()
        handle = msgspec.msgpack.encode(segment.export()).hex()
        self._what = what
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.gpu.client", what, handle, str(-1 if descriptor is None else descriptor)],
            env=os.environ | {"PYTHONPATH": PYTHON_PATH} | environment, cwd=ROOT, text=True,
            pass_fds=[] if descriptor is None else [descriptor],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def hear(self) -> Any:
        """The next thing it says. Fails the test where it says nothing more."""
        line = self._line()
        if not line:
            pytest.fail(f"{self._what} ended with {self._process.wait(ANSWER_S)}:\n{self._read_log()}")
        return json.loads(line)

    def hear_or_death(self) -> Any:
        """The next thing it says, or ``{"died": exit code}``."""
        line = self._line()
        return json.loads(line) if line else {"died": self._process.wait(ANSWER_S), "log": self._read_log()[-2000:]}

    def tell(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> int:
        """Its exit code, when it has done all that it does."""
        self._process.communicate(timeout=ANSWER_S)
        return self._process.returncode

    def _line(self) -> str:
        """One that hangs is killed, which ends the wait."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(ANSWER_S, self._process.kill)
        watchdog.start()
        try:
            return self._process.stdout.readline()
        finally:
            watchdog.cancel()

    def _read_log(self) -> str:
        self._log.seek(0)
        return self._log.read()
