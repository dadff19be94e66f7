"""A Python process on the stand-in, told what to run. Values and errors come back; descriptors go both ways."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from typing import Any

from tests.standin.build import environment

_CHILD = "from tests.standin.process import serve; serve({fd})"
_MAX_BYTES = 1 << 20


class Died(Exception):
    """The process ended instead of answering; ``signal`` is what ended it."""

    def __init__(self, returncode: int) -> None:
        super().__init__(f"the process ended with {returncode}")
        self.signal = signal.Signals(-returncode) if returncode < 0 else None


class Process:
    """``with Process(CUDA_VISIBLE_DEVICES="1") as client: client("x = 1"); client("x + 1")``"""

    def __init__(self, *, nvml: bool = False, accelerator: bool = False, **variables: str | None) -> None:
        self.received: list[int] = []
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-c", _CHILD.format(fd=theirs.fileno())]
            started_with = environment(nvml=nvml, accelerator=accelerator, **variables)
            self._child = subprocess.Popen(command, env=started_with, pass_fds=[theirs.fileno()])

    @property
    def pid(self) -> int:
        return self._child.pid

    def __call__(self, code: str, fds: tuple[int, ...] = (), **values: object) -> Any:
        """Run ``code`` where what it defined before is still there, with ``values`` as further names; returns the
        value of its last line, if that is an expression. ``logged`` is there, too: messages of warnings and errors.

        Raises what it raises, or Died. ``fds`` are there as a list of that name, until the call ends; duplicates of
        what it puts into the list ``lent`` are ``received`` here, and the caller's to close.
        """
        try:
            socket.send_fds(self._socket, [pickle.dumps((code, values))], fds)
            answer, self.received, _, _ = socket.recv_fds(self._socket, _MAX_BYTES, 8)
        except ConnectionError:
            answer = b""
        if not answer:
            raise Died(self._child.wait())
        value, error = pickle.loads(answer)
        if error is not None:
            raise error
        return value

    @property
    def returncode(self) -> int | None:
        """How it ended."""
        return self._child.poll()

    def close(self) -> None:
        """Have it end by itself."""
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(20)

    def kill(self) -> None:
        self._child.kill()
        self._child.wait()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
        self.kill()


def serve(fd: int) -> None:
    """The child's side."""
    with socket.socket(fileno=fd) as wire:
        wire.set_inheritable(False)
        names: dict[str, Any] = {"logged": _listen()}
        while True:
            message, fds, _, _ = socket.recv_fds(wire, _MAX_BYTES, 8)
            if not message:
                return
            code, values = pickle.loads(message)
            names |= {**values, "fds": fds, "lent": []}
            try:
                answer = (_run(code, names), None)
            except Exception as exc:  # noqa: BLE001 - the caller's, whatever it is
                exc.__traceback__ = exc.__cause__ = exc.__context__ = None
                answer = (None, exc)
            for received in fds:
                os.close(received)
            socket.send_fds(wire, [pickle.dumps(answer)], names["lent"])


def _listen() -> list[str]:
    logged: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    logging.getLogger("lunashm").addHandler(Listener(logging.WARNING))
    return logged


def _run(code: str, names: dict[str, Any]) -> Any:
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "<test>", "exec"), names)
    return eval(compile(ast.Expression(last.value), "<test>", "eval"), names) if last is not None else None
