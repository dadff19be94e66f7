"""The demo's second half: real ComfyUI servers, stock and sharing. Owns what they render; bench.vram measures.

bench.vram and what it needs import torch, so they are imported when the first half has been measured.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bench.demo_model import DemoError
from bench.demo_report import Comparison, Memory
from lunashm.memory import ram
from lunashm.memory.posix import PosixRung

if TYPE_CHECKING:
    from bench.comfy_server import ComfyServer
    from bench.host import HostProcess
    from bench.vram import Group

SERVERS = 2
_PARAMETERS = {"sd15-tiny": 151_300_000, "sd15": 1_066_280_000}
_MARGIN_NBYTES = 1 << 30


@dataclass(frozen=True)
class Plan:
    """What the servers render: an architecture of bench.checkpoints in float32, which a CPU computes in."""

    arch: str

    @property
    def nbytes(self) -> int:
        return 4 * _PARAMETERS[self.arch]

    def obstacle(self) -> str:
        """Why it does not fit here; empty if it does."""
        need = _MARGIN_NBYTES + SERVERS * (_MARGIN_NBYTES + 1.2 * self.nbytes)
        free_ram, free_shm = ram.available(), PosixRung().free_nbytes()
        if self.nbytes > free_shm:
            return f"its weights are {self.nbytes / 1e6:.0f} MB, /dev/shm has {free_shm / 1e6:.0f} MB free"
        if need > free_ram:
            return f"{SERVERS} servers need about {need / 1e9:.1f} GB of RAM, {free_ram / 1e9:.1f} GB are free"
        return ""


def checkout() -> Path | None:
    """$LUNASHM_COMFYUI, which must be right where it is set, or ~/ComfyUI; None without either."""
    named = os.environ.get("LUNASHM_COMFYUI")
    root = Path(named or "~/ComfyUI").expanduser()
    if (root / "main.py").is_file() and (root / "comfy" / "sd.py").is_file():
        return root.resolve()
    if named:
        raise DemoError(f"LUNASHM_COMFYUI names {named}, which is no ComfyUI checkout")
    return None


def plans(full: bool) -> list[Plan]:
    """In order of preference: the whole SD1.5 where it is asked for, then the tiny one."""
    return [Plan("sd15"), Plan("sd15-tiny")] if full else [Plan("sd15-tiny")]


def compare(comfy: Path, folder: Path, wanted: Plan) -> Comparison:
    """The same render by stock servers, then by as many that share. Raises DemoError with the server's last words."""
    from bench import checkpoints, vram  # noqa: PLC0415 - see the module's docstring
    from bench.comfy_api import ComfyError  # noqa: PLC0415
    from bench.host import HostFailed  # noqa: PLC0415
    from bench.workflows import txt2img_checkpoint  # noqa: PLC0415
    from bench.workload import Workload  # noqa: PLC0415

    class Float32(Workload):
        """Text encoders too, in both kinds of server: then the host lends the file's bytes as they are."""

        def server(self, host: HostProcess | None = None) -> ComfyServer:
            server = super().server(host)
            server.arguments.append("--fp32-text-enc")
            return server

    models = folder / "comfy-models"
    file = models / "checkpoints" / f"{wanted.arch}.safetensors"
    try:
        checkpoints.make(wanted.arch, file, comfy=comfy, dtype="fp32")
        work = Float32(file, models, txt2img_checkpoint(file.name, size=64, steps=2), comfy)
        stock, shared = (vram.measure(kind, SERVERS, work) for kind in ("stock", "shared"))
    except (checkpoints.CheckpointError, ComfyError, HostFailed) as exc:
        raise DemoError(f"the ComfyUI part failed: {exc}") from exc
    return _comparison(wanted.arch, work.nbytes, stock, shared)


def _comparison(arch: str, nbytes: int, stock: Group, shared: Group) -> Comparison:
    host = Memory("host", shared.attached.host + shared.attached.unmapped, shared.attached.host)
    pairs = zip(stock.images, shared.images, strict=True)
    return Comparison(
        title=f"{SERVERS} ComfyUI servers, one {nbytes / 1e6:,.0f} MB checkpoint ({arch})",
        model_nbytes=nbytes,
        private=_servers(stock.attached.servers, stock.attached.private),
        shared=[*_servers(shared.attached.servers, shared.attached.private), host],
        load_s={"first prompt, stock": stock.first_prompt_s, "first prompt, shared": shared.first_prompt_s},
        identical=sum(one == other for one, other in pairs),
        outputs=SERVERS,
    )


def _servers(pss: Sequence[int], uss: Sequence[int]) -> list[Memory]:
    return [Memory(f"ComfyUI {n}", *sizes) for n, sizes in enumerate(zip(pss, uss, strict=True), 1)]
