"""The processes of bench.lora, one for each way, of which one at a time works.

Owns their start, their end and the lines to and from them; knows no ComfyUI and no statistics.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench import loras, workload
from bench.checkpoints import ROOT
from bench.host import HostProcess
from bench.lora_client import WAYS


class ClientFailed(Exception):
    """A process ended instead of answering; the message ends with its log's tail."""


@dataclass(frozen=True)
class Setting:
    """What all ways run: a model, LoRAs that fit it, an image size in pixels, and the ComfyUI that runs them.

    `device`: the host's; on "cpu" ComfyUI is there, too, else it chooses the GPU. `repeats`: steps in one timing.
    """

    arch: str
    model: Path
    loras: Sequence[Path]
    size: int
    comfy: Path
    device: str = "cpu"
    repeats: int = 1
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def cpu(self) -> bool:
        return self.device == "cpu"


KEEP_FREED_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(4 << 30), "MALLOC_MMAP_THRESHOLD_": str(4 << 30)}
"""For glibc, in all ways alike. By default each step of SD1.5 gets 1 to 2 GB of new pages, as the heap happens to lie,
and how much it is decides over the step's time: a model with merged weights was 43% slower than the same without."""


ASYNC_ALLOCATOR = {"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}
"""What ComfyUI's main.py chooses on NVIDIA GPUs before torch is imported."""


class ClientProcess:
    """Context manager: the process is gone on exit. It starts when made; `wait` until its model is loaded."""

    def __init__(self, way: str, setting: Setting, environment: Mapping[str, str]) -> None:
        self.way = way
        arguments = {"way": way, "model": str(setting.model), "size": setting.size, "cpu": setting.cpu}
        arguments["loras"] = [str(file) for file in setting.loras]
        allocator = {} if setting.cpu else ASYNC_ALLOCATOR
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.lora_client", json.dumps(arguments)],
            cwd=ROOT,
            env=os.environ | environment | KEEP_FREED_MEMORY | allocator
            | {"PYTHONPATH": os.pathsep.join([str(setting.comfy), str(ROOT)])},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def wait(self) -> None:
        self._answer("loading the model")

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._log):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()

    def ask(self, command: str, **arguments: object) -> Any:  # noqa: ANN401 - what the command answers
        """The answer of one of `bench.lora_client.Client`'s commands."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps({"do": command, **arguments}) + "\n")
                self._process.stdin.flush()
        return self._answer(command)

    def _answer(self, command: str) -> Any:  # noqa: ANN401
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            self._log.seek(0)
            tail = self._log.read().decode(errors="replace")[-3000:]
            raise ClientFailed(f"{self.way}: {command} got no answer\n--- end of its log ---\n{tail}")
        return json.loads(line)


@contextlib.contextmanager
def running(setting: Setting) -> Iterator[dict[str, ClientProcess]]:
    """A process for each way, and the host of ours."""
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(HostProcess(roots=[setting.model.resolve().parent], device=setting.device))
        processes = {}
        for way in WAYS:
            environment = dict(setting.environment) | (host.environment if way == "ours" else {})
            processes[way] = stack.enter_context(ClientProcess(way, setting, environment))
        for process in processes.values():
            process.wait()
        yield processes


@contextlib.contextmanager
def prepared(arch: str, size: int, count: int, rank: int, comfy: Path) -> Iterator[Setting]:
    """A float32 model of `arch` and `count` LoRAs for its attention and feed-forward layers, made where need be."""
    kind = "diffusion_models" if arch.startswith("flux") else "checkpoints"
    model = workload.made(arch, "fp32", comfy, kind)
    with tempfile.TemporaryDirectory(prefix="lunashm-loras-") as folder:
        yield Setting(arch, model, stacked(model, Path(folder), count, rank), size, comfy)


def stacked(model: Path, folder: Path, count: int, rank: int) -> list[Path]:
    """LoRAs for `model`'s attention and feed-forward layers in `folder`, made where they are not there yet."""
    files = [folder / f"rank{rank}-{index}.safetensors" for index in range(count)]
    for seed, file in enumerate(files):
        if not file.exists():
            loras.make(model, file, rank=rank, seed=seed, parts=("diffusion_model.",))
    return files
