"""A machine with stand-in GPUs: ComfyUI servers and a lunashm host on it, with one ledger of its memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.comfy_server import ComfyServer
from tests.comfy import conftest as comfy
from tests.cuda.conftest import GpuHost
from tests.standin.build import environment
from tests.tiers import comfy_checkout

models = comfy.models
"""The same files as for servers on the CPU."""

PACKS = Path(__file__).parent / "packs"
MEMORY = 8 << 30
"""Bytes that each GPU has; what is used of it is memory of this machine."""


class Server(ComfyServer):
    """One that says what it holds on its GPUs."""

    def devices(self) -> list[dict[str, int]]:
        """Of each GPU, what ``torch.npu.facts`` counts, and the driver's ``free`` and ``total`` bytes."""
        found: list[dict[str, int]] = json.loads(self.request("/standin/memory"))
        return found

    def reset(self) -> None:
        """Count anew."""
        self.request("/standin/reset", {})

    def loaded(self) -> dict[str, dict[str, Any]]:
        """Loaded models by the name of their class: where their tensors are."""
        return {model["model"]: model for model in json.loads(self.request("/standin/models"))}


class Machine:
    """What runs on it shares its GPUs' memory, and a runtime directory. ``variables``: of the stand-in's, for all."""

    def __init__(self, runtime: Path, models: Path, **variables: str | None) -> None:
        self.runtime = runtime
        self.models = models
        self.variables: dict[str, str | None] = {
            "LUNASHM_STANDIN_LEDGER": str(runtime / "ledger"),
            "LUNASHM_STANDIN_MEMORY": str(MEMORY),
            "LUNASHM_RUNTIME_DIR": str(runtime),
            **variables,
        }
        self._servers: list[Server] = []
        self._hosts: list[GpuHost] = []

    def server(self, *arguments: str, lunashm: bool = True, **variables: str | None) -> Server:
        """A ComfyUI on ``npu:0`` that is up; with the extension linked as ``lunashm comfy install`` does it."""
        nodes = {"accelerator": PACKS / "accelerator"} | ({"lunashm": comfy.ROOT / "comfy_ext"} if lunashm else {})
        server = Server(
            comfy=comfy_checkout(), models=[self.models], custom_nodes=nodes, cpu=False,
            arguments=arguments if any("--cache" in word for word in arguments) else (*arguments, *comfy.KEEP_MODELS),
            environment=environment(accelerator=True, **{**self.variables, **variables}),
        )  # fmt: skip
        self._servers.append(server)
        return server.start()

    def host(self, *flags: str, **variables: str | None) -> GpuHost:
        """``lunashm serve`` on the first GPU, ready."""
        flags = flags if "--device" in flags else ("--device", "cuda:0", *flags)
        host = GpuHost(self.runtime, self.models, *flags, **{**self.variables, **variables})
        self._hosts.append(host)
        assert host.start()["ready"], host.log()
        return host

    def close(self) -> None:
        for server in self._servers:
            server.stop()
        for host in self._hosts:
            host.stop()


@pytest.fixture
def machine(runtime: Path, models: Path) -> Iterator[Machine]:
    machine = Machine(runtime, models)
    yield machine
    machine.close()


@pytest.fixture
def gpu_server(machine: Machine) -> Callable[..., Server]:
    return machine.server


@pytest.fixture
def gpu_host(machine: Machine) -> Callable[..., GpuHost]:
    return machine.host


@pytest.fixture(scope="module")
def shared_machine(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """For tests of one file that leave it as they found it: a server takes some ten seconds to start."""
    machine = Machine(tmp_path_factory.mktemp("gpu"), models)
    yield machine
    machine.close()
