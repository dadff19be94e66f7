"""What a benchmark of ComfyUI renders: one checkpoint, one graph, and servers that can load it.

Owns the options that name the checkpoint, and where made checkpoints are kept: $LUNASHM_BENCH_MODELS, else the user's
cache directory. A made file is kept for the next run.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import platformdirs

from bench import checkpoints
from bench.comfy_server import ComfyServer
from bench.host import HostProcess
from bench.random_weights import DTYPES
from bench.workflows import Graph, txt2img_checkpoint

ARCHS = ("sd15", "sd15-tiny", "sd3-tiny")
READ_NBYTES = 16 << 20


@dataclass(frozen=True)
class Workload:
    """`models` is laid out as ComfyUI's models folder, `file` the checkpoint in it, `root` what a host may serve.

    `cpu`: servers get --cpu; False lets ComfyUI choose the GPU. `environment`: of all servers.
    """

    file: Path
    models: Path
    graph: Graph
    comfy: Path
    cpu: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    _folder: tempfile.TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)

    @property
    def root(self) -> Path:
        return self.file.resolve().parent

    @property
    def nbytes(self) -> int:
        return self.file.stat().st_size

    def server(
        self,
        host: HostProcess | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> ComfyServer:
        """Stock ComfyUI; with the extension, tied to `host`, where there is one."""
        nodes = {"lunashm": checkpoints.ROOT / "comfy_ext"} if host else {}
        return ComfyServer(
            comfy=self.comfy, models=[self.models], custom_nodes=nodes, arguments=arguments, cpu=self.cpu,
            environment=(host.environment if host else {}) | dict(self.environment) | dict(environment or {}),
        )  # fmt: skip

    def host(
        self, device: str = "cpu", mode: str = "force_daemon", variables: Mapping[str, str] | None = None
    ) -> HostProcess:
        return HostProcess(roots=[self.root], device=device, mode=mode, variables=variables)

    def warm(self) -> None:
        """Read the file once, so that it is in the page cache as far as memory allows."""
        read_through(self.file)


def read_through(file: Path) -> None:
    buffer = bytearray(READ_NBYTES)
    with open(file, "rb", buffering=0) as opened:
        while opened.readinto(buffer):
            pass


def models_folder() -> Path:
    """Where made checkpoints are kept, laid out as ComfyUI's models folder."""
    named = os.environ.get("LUNASHM_BENCH_MODELS")
    return Path(named).expanduser() if named else platformdirs.user_cache_path("lunashm-bench") / "models"


def made(arch: str, dtype: str, comfy: Path, folder: str = "checkpoints") -> Path:
    """A checkpoint with random weights, made where it isn't there yet."""
    file = models_folder() / folder / f"{arch}-{dtype}.safetensors"
    if not file.exists():
        checkpoints.make(arch, file, comfy=comfy, dtype=dtype)
    return file


def add_arguments(parser: argparse.ArgumentParser, arch: str, dtype: str, render: bool = True) -> None:
    """--checkpoint or --arch and --dtype, --comfy; with `render` also --size and --steps."""
    parser.add_argument("--checkpoint", type=Path, metavar="FILE", help="a .safetensors checkpoint of yours")
    parser.add_argument("--arch", choices=ARCHS, default=arch, help=f"else one is made (default: {arch})")
    parser.add_argument("--dtype", choices=list(DTYPES), default=dtype)
    parser.add_argument("--comfy", help="ComfyUI checkout (default: $LUNASHM_COMFYUI, else ~/ComfyUI)")
    if render:
        parser.add_argument("--size", type=int, default=64, help="image side in pixels (default: 64)")
        parser.add_argument("--steps", type=int, default=2, help="sampling steps (default: 2)")


def checkpoint_file(args: argparse.Namespace) -> Path:
    """The file that the arguments name, made if need be."""
    if args.checkpoint is not None:
        return Path(args.checkpoint).absolute()
    return made(args.arch, args.dtype, checkpoints.comfy_root(args.comfy))


def from_arguments(args: argparse.Namespace) -> Workload:
    file = checkpoint_file(args)
    comfy = checkpoints.comfy_root(args.comfy)
    sd3 = args.arch == "sd3-tiny" and args.checkpoint is None
    graph = txt2img_checkpoint(file.name, size=args.size, steps=args.steps, sd3=sd3)
    if file.parent.name == "checkpoints":
        return Workload(file, file.parent.parent, graph, comfy)
    folder = tempfile.TemporaryDirectory(prefix="lunashm-models-")
    (Path(folder.name) / "checkpoints").mkdir()
    (Path(folder.name) / "checkpoints" / file.name).symlink_to(file)
    return Workload(file, Path(folder.name), graph, comfy, _folder=folder)
