"""What all tests stand on: one host, stock and shared servers as many as are asked for, and what they draw.

Servers are started when a test first asks for them and stay for the next one, which finds them as the last one left
them. Owns no measurement and no claim.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import checkpoints
from bench.acceptance import graphs
from bench.acceptance.graphs import Picture
from bench.acceptance.memory import RamMeter
from bench.acceptance.models import Models
from bench.acceptance.pixels import Pixels
from bench.acceptance.scale import Scale
from bench.comfy_server import ComfyServer
from bench.gpu.device_memory import Meter
from bench.gpu.memory_start import started
from bench.gpu.part import Context
from bench.host import HostProcess
from bench.workflows import Graph, Lora, pixels
from bench.workload import Workload
from lunashm import protocol as p
from lunashm.cli.hosts import ask_once
from lunashm.client import attach

KINDS = ("stock", "shared")
KEEP_MODELS = ("--cache-classic",)
"""By default ComfyUI drops loaders' outputs between prompts where RAM is short: then every prompt loads anew."""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
"""For who computes on the CPU: threads that wait for each other stall tiny steps, and servers outnumber cores."""


class Stage:
    """Context manager. ``device``: the host's; on "cpu" ComfyUI is there, too."""

    def __init__(self, scale: Scale, comfy: Path, device: str, folder: Path) -> None:
        self.scale, self.comfy, self.device, self.folder = scale, comfy, device, folder
        self._all = contextlib.ExitStack()
        self._servers: dict[str, list[ComfyServer]] = {kind: [] for kind in KINDS}
        self._host: HostProcess | None = None
        self._drawn: dict[tuple[object, ...], Pixels] = {}
        os.environ["LUNASHM_COMFYUI"] = str(comfy)
        self.models = Models(folder / "models", scale.arch, comfy)
        self.models.checkpoint(scale.large)
        context = Context(device, self.on_cpu, folder, comfy)
        self.meter: Meter = RamMeter() if self.on_cpu else Meter(context)

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exc: object) -> None:
        self._all.close()

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"

    # -- who runs ----------------------------------------------------------------------------------------------------

    @property
    def host(self) -> HostProcess:
        """One that servers with the extension prefer to a copy of their own: they say why where they have one."""
        if self._host is None:
            self._host = HostProcess(roots=self.models.roots, device=self.device, mode="auto")
            self._all.callback(self._host.stop)
            self._host.start()
        return self._host

    def servers(self, kind: str, count: int) -> list[ComfyServer]:
        """The first so many of a kind, up and answering."""
        self.start({kind: count})
        return self._servers[kind][:count]

    def start(self, counts: Mapping[str, int]) -> None:
        """So many of each kind, those that are missing at once."""
        fresh = {
            kind: [self._server(kind) for _ in range(count - len(self._servers[kind]))]
            for kind, count in counts.items()
        }
        started(self._all, [server for servers in fresh.values() for server in servers])
        for kind, servers in fresh.items():
            self._servers[kind] += servers

    @property
    def stock(self) -> ComfyServer:
        return self.servers("stock", 1)[0]

    @property
    def shared(self) -> ComfyServer:
        return self.servers("shared", 1)[0]

    def keep(self, kind: str, count: int) -> None:
        """End all servers of a kind but the first so many."""
        for server in self._servers[kind][count:]:
            server.stop()
        del self._servers[kind][count:]

    def follow(self, servers: Sequence[ComfyServer]) -> Meter:
        """The device's memory, by the host and these where the device cannot tell by itself."""
        self.meter.follow([server.pid for server in servers], self.host.pid)
        return self.meter

    @property
    def workload(self) -> Workload:
        """For what measures servers in general: a picture without LoRA by stock nodes."""
        file, graph = self.models.path(self.models.name), graphs.stock(self.picture())
        return Workload(file, self.models.folder, graph, self.comfy, cpu=self.on_cpu)

    def _server(self, kind: str) -> ComfyServer:
        shared = kind == "shared"
        alone = ONE_THREAD if self.on_cpu else {}
        return ComfyServer(
            comfy=self.comfy, models=self.models.folders, cpu=self.on_cpu, arguments=KEEP_MODELS,
            custom_nodes={"lunashm": checkpoints.ROOT / "comfy_ext"} if shared else {},
            environment=(self.host.environment if shared else {}) | alone,
        )  # fmt: skip

    # -- what they draw ----------------------------------------------------------------------------------------------

    def picture(self, loras: Sequence[Lora] = (), seed: int = 1, **other: Any) -> Picture:  # noqa: ANN401
        plain = Picture(self.models.name, self.scale.side, self.scale.steps, seed, tuple(loras))
        return dataclasses.replace(plain, **other)

    def stocks(self, picture: Picture) -> Pixels:
        """What stock ComfyUI makes of it; drawn once."""
        key = dataclasses.astuple(picture)
        if key not in self._drawn:
            self._drawn[key] = pixels(self.stock.render(graphs.stock(picture)))
        return self._drawn[key]

    @staticmethod
    def draw(server: ComfyServer, graph: Graph) -> Pixels:
        return pixels(server.render(graph))

    @staticmethod
    def texts(server: ComfyServer, graph: Graph) -> dict[str, str]:
        """What a graph shows as text, by node."""
        outputs = server.run(graph)["outputs"]
        return {node: output["text"][0] for node, output in outputs.items() if "text" in output}

    # -- the host's bytes --------------------------------------------------------------------------------------------

    def status(self) -> p.Status:
        return ask_once(self.host.endpoint, p.GetStatus(), p.Status)

    @contextlib.contextmanager
    def checksum(self, name: str) -> Iterator[Callable[[], str]]:
        """Of the shared bytes of a checkpoint, those that most servers have, as they are when it is called.

        They are mapped here as long as the context, which is to be over before memory is measured.
        """
        file = self.models.path(name).resolve()
        held = [model for model in self.status().models if Path(model.path).resolve() == file]
        if not held:
            raise LookupError(f"the host does not lend {name}; it lends {self.lent()}")
        model = max(held, key=lambda one: one.clients)
        dtypes = {rule.prefix: rule.dtype for rule in model.rules}
        with attach(model.path, dtypes=dtypes, endpoint=self.host.endpoint.url, device=self.device) as mapped:
            if mapped.manifest.generation != model.generation:
                raise LookupError(f"{name} was attached in other dtypes than the servers': {dtypes}")
            yield mapped.checksum

    def lent(self) -> dict[str, int]:
        """Name -> bytes."""
        return {model.name: model.nbytes for model in self.status().models}
