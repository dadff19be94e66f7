"""Client processes as a step drives them: each runs one program of ``bench.gpu.client``, says JSON lines, and goes on
when it is told. One that dies or hangs says so instead of failing the step: that may be what is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from bench.gpu.part import Context
from bench.gpu.step import StepFailed
from bench.host import HostProcess
from bench.root import ROOT
from lunashm import protocol
from lunashm.client.connection import Connection
from lunashm.manifest import DtypeRule
from lunashm.memory import ON_GPU

ANSWER_S = 60.0
"""torch and a context take seconds to start; only a client that hangs takes this long."""
_LOAD_S = 120.0


def host(context: Context, file: Path, memory: str = "auto") -> HostProcess:
    """A host on the device, that may serve ``file``; it is started by ``with``."""
    return HostProcess(roots=[file.parent], start_timeout_s=120.0, device=context.device, memory=memory)


def load(host: HostProcess, file: Path, dtype: str = "") -> protocol.Loaded:
    """Have the host load a file; returns when it is there."""
    connection = Connection(host.endpoint)
    try:
        reply = connection.request(protocol.Load(str(file), (DtypeRule("", dtype),), _LOAD_S), _LOAD_S + 10)
    finally:
        connection.close()
    assert isinstance(reply, protocol.Loaded)
    return reply


def unload(host: HostProcess, name: str) -> None:
    connection = Connection(host.endpoint)
    try:
        connection.request(protocol.Unload(name, True))
    finally:
        connection.close()


def rungs(context: Context) -> tuple[str, ...]:
    """Which to look at; of what differs by a name alone one is enough for a dry run."""
    return ON_GPU[:1] if context.dry else ON_GPU


class Client:
    """``with Client(context, "attach", file, host) as client: client.hear()``"""

    def __init__(
        self,
        context: Context,
        program: str,
        file: Path,
        host: HostProcess,
        options: Mapping[str, object] | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self._program = program
        self._hung = False
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        wanted = {"file": str(file), "device": context.device, "dry": context.dry, **(options or {})}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("LUNASHM_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.client", program, json.dumps(wanted)],
            env={**inherited, **host.environment, **(variables or {})}, cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def hear(self) -> Any:  # noqa: ANN401 - JSON
        """The next thing it says. Raises StepFailed where it ended instead."""
        said = self.hear_or_death()
        if isinstance(said, dict) and "died" in said:
            raise StepFailed(f"the client {self._program!r} ended with {said['died']}:\n{said['words']}")
        return said

    def hear_or_death(self) -> Any:  # noqa: ANN401
        """The next thing it says, or ``{"died": exit code, "words": the end of its log}``; ``hung``: for so many
        seconds, then it was killed."""
        line = self._line()
        if line:
            return json.loads(line)
        code = self._process.wait(ANSWER_S)
        self._log.seek(0)
        return {"died": code, "words": self._log.read()[-1500:], **({"hung": ANSWER_S} if self._hung else {})}

    def tell(self) -> None:
        """It goes on."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it died; hear() tells
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._log.close()

    def _line(self) -> str:
        """One that hangs is killed, which ends the wait."""
        assert self._process.stdout is not None
        watchdog = threading.Timer(ANSWER_S, self._give_up)
        watchdog.start()
        try:
            return self._process.stdout.readline()
        finally:
            watchdog.cancel()

    def _give_up(self) -> None:
        self._hung = True
        self._process.kill()
