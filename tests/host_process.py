"""A host in a process of its own (``python -m tests.host_process RUNTIME ROOT TTL RUNG``), and how tests drive it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lunashm import protocol as p
from lunashm.client.connection import Connection
from lunashm.paths import Endpoint

ROOT = Path(__file__).parents[1]


class HostProcess:
    """``models``: the directory it may open files in."""

    def __init__(
        self, runtime: Path, models: Path, ttl_s: float = 15.0, prefix: tuple[str, ...] = (), rung: str = "posix"
    ) -> None:
        self.runtime = runtime
        self.models = models
        self.endpoint = Endpoint.parse(f"ipc://{runtime}/cpu.sock")
        self._log = runtime / "host.log"
        arguments = [str(runtime), str(models), str(ttl_s), rung]
        self._command = [*prefix, sys.executable, "-m", "tests.host_process", *arguments]
        self._process: subprocess.Popen[str] | None = None

    @property
    def process(self) -> subprocess.Popen[str]:
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def start(self) -> None:
        environment = os.environ | {"LUNASHM_RUNTIME_DIR": str(self.runtime)}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.process.stdout.close()
        assert line, self.log()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """As a service manager does it. Returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def segments(self) -> set[Path]:
        """The shared memory it owns right now; other hosts of this machine have theirs."""
        targets = {link.readlink() for link in Path(f"/proc/{self.pid}/fd").iterdir() if link.is_symlink()}
        return {target for target in targets if target.parent == Path("/dev/shm")}

    def log(self) -> str:
        return self._log.read_text()

    # -- questions, each over a connection of its own --------------------------------------------------------------

    def ask(self, request: p.Message) -> p.Reply:
        connection = Connection(self.endpoint)
        try:
            return connection.request(request)
        finally:
            connection.close()

    def status(self) -> p.Status:
        reply = self.ask(p.GetStatus())
        assert isinstance(reply, p.Status)
        return reply

    def leases(self) -> int:
        return self.status().leases

    def clients(self) -> tuple[p.ClientStatus, ...]:
        reply = self.ask(p.ListClients())
        assert isinstance(reply, p.Clients)
        return reply.clients

    def empty(self) -> None:
        """Unload everything. A model that somebody holds drains, and goes when they do."""
        while ready := [model for model in self.status().models if model.state == "ready"]:
            self.ask(p.Unload(ready[-1].name, True))


@contextlib.contextmanager
def started(
    runtime: Path, models: Path, ttl_s: float = 15.0, prefix: tuple[str, ...] = (), rung: str = "posix"
) -> Iterator[HostProcess]:
    host = HostProcess(runtime, models, ttl_s, prefix, rung)
    try:
        host.start()
        yield host
    finally:
        if host.process.poll() is None:
            code = host.stop()
            assert code == 0, f"exit code {code}:\n{host.log()}"


def main(runtime: str, root: str, ttl_s: str, rung: str) -> None:
    from lunashm.host.server import Server
    from lunashm.memory import rung_for

    logging.basicConfig(level="INFO", format="%(message)s")
    endpoint = Endpoint.parse(f"ipc://{runtime}/cpu.sock")
    server = Server(rung=rung_for(rung, "cpu"), endpoint=endpoint, roots=(root,), ttl_s=float(ttl_s))
    server.run(lambda info: print(json.dumps({"pid": info.pid}), flush=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
