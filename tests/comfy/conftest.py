"""Real ComfyUI servers, a real host, tiny checkpoints that stock loaders accept. Built once per run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import save_file

from bench import checkpoints, loras
from bench.comfy_server import ComfyServer
from tests.comfy.lora_files import LoraFile, make_all
from tests.tiers import comfy_checkout

ROOT = Path(__file__).parents[2]


class Host:
    """``lunashm serve`` with a runtime directory of its own."""

    def __init__(self, runtime: Path, roots: list[Path], memory: str = "auto") -> None:
        self.runtime = runtime
        self._flags = ["--memory", memory, *(argument for root in roots for argument in ("--root", str(root)))]
        self._process: subprocess.Popen[str] | None = None

    @property
    def environment(self) -> dict[str, str]:
        return {"LUNASHM_RUNTIME_DIR": str(self.runtime)}

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lunashm", "serve", "--json", *self._flags],
            env=os.environ | self.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert json.loads(line)["ready"], line

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            assert self._process.wait(20) == 0
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()

    def models(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self.ask("ps")["models"]
        return listed

    def clients(self) -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = self.ask("clients")["clients"]
        return listed

    def ask(self, *arguments: str) -> dict[str, Any]:
        """What ``lunashm ARGUMENTS --json`` prints."""
        done = subprocess.run(
            [sys.executable, "-m", "lunashm", *arguments, "--json"],
            env=os.environ | self.environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer


@contextmanager
def running_host(runtime: Path, roots: list[Path], memory: str = "auto") -> Iterator[Host]:
    host = Host(runtime, roots, memory)
    host.start()
    try:
        yield host
    finally:
        host.stop()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``models`` folder with one checkpoint of each shape, and LoRAs for SD1.5."""
    folder = tmp_path_factory.mktemp("comfy") / "models"
    comfy = comfy_checkout()
    made = {
        "sd15-tiny": "checkpoints/sd15-tiny.safetensors",
        "sd3-tiny": "checkpoints/sd3-tiny.safetensors",
        "flux-tiny": "diffusion_models/flux-tiny.safetensors",
        "clip-l": "text_encoders/clip-l.safetensors",
        "vae-tiny": "vae/vae-tiny.safetensors",
    }
    for arch, name in made.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        checkpoints.make(arch, folder / name, comfy=comfy)
    # enough of a CLIP-G for a loader to take it for one: stock leaves the missing rest uninitialised
    g_layer = {"text_model.encoder.layers.30.mlp.fc1.weight": torch.randn(5120, 1280, dtype=torch.float16)}
    save_file(g_layer, folder / "text_encoders" / "clip-g.safetensors")
    # as in Hugging Face's cache: a name that links to a content-addressed file without a suffix
    blob = folder / "blobs" / "0123abcd"
    blob.parent.mkdir()
    shutil.copy(folder / made["vae-tiny"], blob)
    (folder / "vae" / "linked.safetensors").symlink_to(blob)
    (folder / "loras").mkdir()
    for seed, name in enumerate(("a", "b")):
        base = folder / made["sd15-tiny"]
        loras.make(base, folder / "loras" / f"{name}.safetensors", rank=4, strength=0.2, seed=seed)
    return folder


@pytest.fixture(scope="session")
def stock(models: Path) -> Iterator[ComfyServer]:
    """Unmodified ComfyUI: what every picture is compared with."""
    with ComfyServer(comfy=comfy_checkout(), models=[models]) as server:
        yield server


@pytest.fixture(scope="session")
def host(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with running_host(tmp_path_factory.mktemp("run"), [models]) as running:
        yield running


KEEP_MODELS = ("--cache-classic",)
"""By default ComfyUI drops a loader's outputs between two prompts where the machine is short of RAM: then the next
prompt loads anew, and nothing is left of the model that a test is about."""


def shared_server(models: Path, environment: dict[str, str], *arguments: str) -> ComfyServer:
    """ComfyUI with the extension linked into custom_nodes, as ``lunashm comfy install`` does it.

    ``arguments``: in place of KEEP_MODELS.
    """
    nodes = {"lunashm": ROOT / "comfy_ext"}
    return ComfyServer(
        comfy=comfy_checkout(), models=[models], custom_nodes=nodes, environment=environment,
        arguments=arguments or KEEP_MODELS,
    )  # fmt: skip


@pytest.fixture(scope="session")
def shared(models: Path, host: Host) -> Iterator[ComfyServer]:
    with shared_server(models, host.environment) as server:
        yield server


class LoraFiles:
    """The files of tests.comfy.lora_files, made when first asked for, where the servers' LoraLoader finds them."""

    CHECKPOINTS: ClassVar = {
        "sd15-tiny": "checkpoints/sd15-tiny.safetensors",
        "sd3-tiny": "checkpoints/sd3-tiny.safetensors",
        "flux-tiny": "diffusion_models/flux-tiny.safetensors",
    }

    def __init__(self, models: Path) -> None:
        self._models = models
        self._made: dict[str, dict[str, LoraFile]] = {}

    def checkpoint(self, arch: str) -> Path:
        return self._models / self.CHECKPOINTS[arch]

    def of(self, arch: str) -> dict[str, LoraFile]:
        if arch not in self._made:
            self._made[arch] = make_all(arch, self.checkpoint(arch), self._models / "loras" / arch)
        return self._made[arch]

    def node_name(self, arch: str, name: str) -> str:
        """As a LoraLoader node calls it."""
        return str(self.of(arch)[name].path.relative_to(self._models / "loras"))


@pytest.fixture(scope="session")
def lora_files(models: Path) -> LoraFiles:
    return LoraFiles(models)
