"""The processes of a test run: one for each rung and part, started when asked for, and again after a death."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from typing import Any

import pytest

from lunashm.errors import LunashmError, from_code
from lunashm.memory import Rung
from tests.contracts import wire
from tests.contracts.actor import Actor
from tests.contracts.orders import Sent, carry_out, failure
from tests.contracts.rungs import ROOT, Entry

ANSWER_S = 60.0
"""For what takes milliseconds on an idle machine; a GPU's first context takes seconds."""


class ActorDied(Exception):
    """``status``: the exit code, or minus the signal."""

    def __init__(self, status: int, log: str) -> None:
        super().__init__(f"the actor ended with {status}:\n{log}")
        self.status = status


def raise_failure(problem: wire.Failure) -> None:
    if problem.code == "bug":
        pytest.fail(f"the actor raised what nobody should:\n{problem.message}")
    if problem.code == "ValueError":
        raise ValueError(problem.message)
    raise from_code(problem.code, problem.message)


class ActorProcess:
    """A process that is asked one thing at a time."""

    def __init__(self, entry: Entry) -> None:
        self._entry = entry
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by stop()
        self._channel, theirs = wire.pair()
        self.answer_within(ANSWER_S)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.contracts.actor", entry.rung, entry.device, str(theirs.fileno())],
                env=entry.environment(), cwd=ROOT, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
            )  # fmt: skip
        if entry.on_gpu:
            self._check_driver()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def answer_within(self, seconds: float) -> None:
        """Else the test fails, and the actor is killed."""
        self._channel.settimeout(seconds)

    def call(self, name: str, *arguments: Any, descriptor: int | None = None, starved: bool = False) -> Any:
        value, received = self._ask(wire.Call(name, arguments, starved), descriptor)
        assert received is None
        return value

    def call_for_descriptor(self, name: str, *arguments: Any) -> int | None:
        return self._ask(wire.Call(name, arguments), None)[1]

    def kill(self) -> None:
        """At once, as the kernel does it to a process that takes too much memory."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._channel.close()

    def stop(self) -> int:
        """It ends by itself, as a program that is done does. Returns its exit code."""
        self._channel.close()
        try:
            return self._process.wait(ANSWER_S)
        finally:
            self._process.kill()
            self._process.wait()
            self._log.close()

    def _ask(self, call: wire.Call, descriptor: int | None) -> tuple[Any, int | None]:
        answer: wire.Answer | wire.Failure
        try:
            wire.send(self._channel, call, descriptor)
            answer, received = wire.receive(self._channel, wire.Answer | wire.Failure)
        except TimeoutError:
            patience = self._channel.gettimeout()
            self.kill()
            pytest.fail(f"the actor of {self._entry.rung} did not answer {call.name} within {patience:g} s")
        except (EOFError, OSError):
            raise ActorDied(self._process.wait(ANSWER_S), self._read_log()) from None
        if isinstance(answer, wire.Failure):
            raise_failure(answer)
            raise AssertionError
        return answer.value, received

    def _read_log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def _check_driver(self) -> None:
        """Nothing may pass on a driver that was not meant."""
        drivers = self.call("libraries", "libcuda.so")
        if self._entry.standin:
            from tests.standin import build

            assert drivers == [str(build.folder() / build.LIBRARY)]
        else:
            assert drivers and not any("standin" in path for path in drivers), drivers


class InProcess:
    """An actor without a process, for memory that only one process can reach. Calls take the same way otherwise."""

    def __init__(self, rung: Rung) -> None:
        self._actor = Actor(rung)

    def call(self, name: str, *arguments: Any, descriptor: int | None = None, starved: bool = False) -> Any:
        assert descriptor is None and not starved
        try:
            return carry_out(self._actor, wire.Call(name, arguments))
        except (LunashmError, ValueError) as exc:
            problem = failure(exc)
        raise_failure(problem)

    def call_for_descriptor(self, name: str, *arguments: Any) -> int | None:
        sent = self.call(name, *arguments)
        assert isinstance(sent, Sent)
        return sent.descriptor


class Actors:
    """``get`` finds the one that plays a part, or starts it."""

    def __init__(self) -> None:
        self._running: dict[tuple[Entry, str], ActorProcess] = {}

    def get(self, entry: Entry, part: str) -> ActorProcess:
        actor = self._running.get((entry, part))
        if actor is None or not actor.alive:
            if actor is not None:
                actor.stop()
            actor = self._running[entry, part] = ActorProcess(entry)
        return actor

    def clean(self, entry: Entry) -> None:
        """Nothing of one test is left for the next."""
        for (owner, _), actor in self._running.items():
            if owner == entry and actor.alive:
                actor.call("clean")

    def stop(self) -> None:
        """Those that live must end well."""
        running, self._running = self._running, {}
        living = [actor for actor in running.values() if actor.alive]
        codes = {actor: actor.stop() for actor in running.values()}
        assert not any(codes[actor] for actor in living), codes


__all__ = ["ActorDied", "ActorProcess", "Actors", "InProcess"]
