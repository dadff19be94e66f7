"""A real, unmodified ComfyUI server in a process group of its own.

Owns its private base directory (custom nodes, output, user data and database), its port, its log and its end.
Knows nothing of lunashm: what a server runs with comes in as custom node directories, arguments, environment.

    with ComfyServer(models=[models], custom_nodes={"lunashm": "comfy_ext"}) as server:
        png = server.render(txt2img_checkpoint("sd15-tiny.safetensors"))
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from bench import front_end
from bench.checkpoints import ROOT, comfy_root
from bench.comfy_api import POLL_S, ComfyApi, ComfyError, PromptFailed, PromptRejected, ServerFailed
from bench.process_memory import tree_memory

__all__ = ["ComfyError", "ComfyServer", "PromptFailed", "PromptRejected", "ServerFailed"]

FOLDERS = ("models", "custom_nodes", "input", "output", "temp", "user")


def free_port() -> int:
    """A loopback port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_group(process: subprocess.Popen[bytes], grace_s: float = 0.0) -> None:
    """SIGTERM (when there is grace), then SIGKILL to the whole group; reaps the leader, once."""
    with contextlib.suppress(ProcessLookupError):
        if grace_s > 0 and process.returncode is None:
            os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + grace_s
            while time.monotonic() < deadline and not _exited(process):
                time.sleep(POLL_S)
        if process.returncode is None:  # not reaped: the group's number is still its own
            os.killpg(process.pid, signal.SIGKILL)  # with it children that outlive the leader
    process.wait()


def _exited(process: subprocess.Popen[bytes]) -> bool:
    """Whether it has ended; does not reap it, so that its number and its group's stay taken."""
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # another thread is reaping it just now
        return True


class ComfyServer(ComfyApi):
    """Context manager: up and answering on entry, its whole process group gone on exit.

    models        folders laid out as ComfyUI's `models` (checkpoints/, vae/ ...); searched, never written
    custom_nodes  name -> directory, linked into the private custom_nodes
    arguments     further command line arguments, as ("--fp32-text-enc",)
    environment   added to this process's environment
    base          private base directory, kept on exit; by default a temporary one, removed on exit
    cpu           pass --cpu; False lets ComfyUI choose the GPU
    """

    def __init__(
        self,
        *,
        comfy: str | Path | None = None,
        models: Sequence[str | Path] = (),
        custom_nodes: Mapping[str, str | Path] | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        base: str | Path | None = None,
        port: int | None = None,
        cpu: bool = True,
        start_timeout_s: float = 120.0,
        stop_timeout_s: float = 10.0,
        python: str = sys.executable,
    ) -> None:
        super().__init__(port or free_port())
        self.comfy = comfy_root(comfy)
        self.models = [Path(folder).expanduser().resolve() for folder in models]
        self.custom_nodes = {n: Path(p).expanduser().resolve() for n, p in (custom_nodes or {}).items()}
        for path in (*self.models, *self.custom_nodes.values()):
            if not path.is_dir():
                raise ServerFailed(f"no such directory: {path}")
        self.arguments, self.environment = list(arguments), dict(environment or {})
        self.cpu, self.python = cpu, python
        self.start_timeout_s, self.stop_timeout_s = start_timeout_s, stop_timeout_s
        self.started_s = 0.0  # wall time from exec to the first answer
        self._keep_base = base is not None
        self.base = Path(base or tempfile.mkdtemp(prefix="comfy-bench-")).resolve()
        if not self._keep_base:
            weakref.finalize(self, shutil.rmtree, self.base, True)  # runs after the process's own, made later
        self.log = self.base / "server.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._log_text = ""
        self._nothing = 0  # prompts of it so far

    # --- life -----------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def start(self) -> Self:
        """Lay out the base directory, start the server and wait until it answers; stops it if it does not."""
        for folder in FOLDERS:
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        for name, source in self.custom_nodes.items():
            link = self.base / "custom_nodes" / name
            link.unlink(missing_ok=True)
            link.symlink_to(source)
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"} | self.environment
        if self.custom_nodes:  # a custom node of this repository imports its packages
            paths = (environment.get("PYTHONPATH"), str(ROOT))
            environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        began = time.monotonic()
        with open(self.log, "ab") as log:
            self._process = subprocess.Popen(
                self._command(), cwd=self.comfy, env=environment, start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        weakref.finalize(self, _end_group, self._process)  # also runs when the interpreter exits
        try:
            self._wait_until_up(began + self.start_timeout_s)
        except BaseException:
            self.stop()
            raise
        self.started_s = time.monotonic() - began
        return self

    def _wait_until_up(self, deadline: float) -> None:
        while True:
            try:
                self.system_stats()
                return
            except ServerFailed:
                if not self.alive:
                    raise
            if time.monotonic() > deadline:
                raise self.failure(f"did not come up in {self.start_timeout_s:.0f} s")
            time.sleep(POLL_S)

    def _command(self) -> list[str]:
        roots = {
            f"bench{index}": {folder.name: str(folder) for folder in sorted(root.iterdir()) if folder.is_dir()}
            for index, root in enumerate(self.models)
        }
        paths = self.base / "extra_model_paths.yaml"
        paths.write_text(json.dumps(roots))  # JSON is YAML
        user = self.base / "user"
        options = {
            "--listen": self.host,
            "--port": str(self.port),
            "--base-directory": str(self.base),
            "--output-directory": str(self.base / "output"),
            "--temp-directory": str(self.base),
            "--user-directory": str(user),
            # By default one file in the checkout, under a lock: servers would fight over it.
            "--database-url": f"sqlite:///{user / 'comfyui.db'}",
            "--extra-model-paths-config": str(paths),
            "--preview-method": "none",
        }
        flags = ["--disable-auto-launch", "--disable-api-nodes", *(["--cpu"] if self.cpu else [])]
        front_end_root = front_end.root(self.python, self.base)
        if front_end_root is not None:
            options["--front-end-root"] = str(front_end_root)
        named = [word for option in options.items() for word in option]
        return [self.python, "main.py", *named, *flags, *self.arguments]

    def stop(self) -> None:
        """End the process group: SIGTERM, then SIGKILL after `stop_timeout_s`. Safe to call twice."""
        if self._process is not None:
            _end_group(self._process, self.stop_timeout_s)
        if not self._keep_base and self.base.exists():
            self._log_text = self.log_text()
            shutil.rmtree(self.base, ignore_errors=True)

    def kill(self) -> None:
        """SIGKILL to the whole group, as a crash would; the base directory stays until stop()."""
        _end_group(self._started)

    def free(self, settle_timeout_s: float = 10.0) -> None:
        """Unload all models, drop cached results, and wait until memory stands still for half a second.

        The server only notes the wish, looks at it after the prompt that comes next, and gives no sign when done. So
        two prompts of nothing follow: where the second one ran, the wish was granted.
        """
        super().free()
        for _ in range(2):
            self._nothing += 1
            nothing = {"class_type": "EmptyLatentImage", "inputs": {"width": 16, "height": 16, "batch_size": 1}}
            shown = {"class_type": "PreviewAny", "inputs": {"source": ["nothing", 0], "bench_nonce": self._nothing}}
            self.run({"nothing": nothing, "shown": shown})
        deadline, still, last = time.monotonic() + settle_timeout_s, 0, -1
        while still < 5 and time.monotonic() < deadline:
            time.sleep(0.1)
            now = self.memory()["private"]
            still, last = (still + 1 if abs(now - last) < 1 << 20 else 0), now

    # --- what can be seen of it -----------------------------------------------------------------------

    @property
    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise ServerFailed("the server has not been started")
        return self._process

    @property
    def pid(self) -> int:
        return self._started.pid

    @property
    def alive(self) -> bool:
        return self._process is not None and not _exited(self._process)

    def memory(self) -> dict[str, int]:
        """Bytes of the server and its descendants; see `tree_memory`."""
        try:
            return tree_memory(self.pid)
        except ProcessLookupError as exc:
            raise self.failure("has no memory to measure") from exc

    def log_text(self) -> str:
        """All that the server wrote to stdout and stderr so far; still there after stop()."""
        return self.log.read_text(errors="replace") if self.log.exists() else self._log_text

    def failure(self, what: str) -> ServerFailed:
        ended = "" if self.alive else " (its process has ended)"
        tail = self.log_text()[-3000:]
        return ServerFailed(f"ComfyUI on port {self.port} {what}{ended}\n--- end of its log ---\n{tail}")
