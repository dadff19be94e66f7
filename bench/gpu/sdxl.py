"""What parts of the GPU suite render: an SDXL-shaped checkpoint with random weights, at 1024x1024.

In a dry run a toy stands in for it: SD1.5 of one level, at 64x64, on the CPU. There is no tiny SDXL (ComfyUI's
detection wants all its depths, and both its text encoders are built whole).

What has to be there for the real one: a ComfyUI checkout and the packages its server imports (aiohttp, av,
comfy-kitchen, comfy-aimdo, transformers ... ). No front end: where comfyui_frontend_package is not installed, an empty
folder stands in for it ($COMFYUI_FRONT_END_ROOT names another). 7 GB of disk below the scratch folder.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from bench import checkpoints
from bench.comfy_server import ComfyServer
from bench.gpu.part import Context, Measured
from bench.report import Figure
from bench.workflows import Graph, Lora, txt2img_checkpoint
from bench.workload import Workload, read_through

GB = 1e9
TOY, REAL = "sd15-tiny", "sdxl"


@dataclass(frozen=True)
class Size:
    """What is rendered: side in pixels, steps of a short and a long prompt (their difference is what steps cost)."""

    side: int
    short: int
    long: int


def size_of(context: Context) -> Size:
    return Size(64, 1, 3) if context.dry else Size(1024, 4, 24)


def checkpoint(context: Context) -> Path:
    """The file, made where it is not there yet."""
    arch = TOY if context.dry else REAL
    file = context.scratch / "models" / "checkpoints" / f"{arch}-fp16.safetensors"
    if not file.exists():
        checkpoints.make(arch, file, comfy=context.comfyui, dtype="fp16")
    return file


def graph(context: Context, steps: int, loras: list[Lora] | None = None) -> Graph:
    return txt2img_checkpoint(checkpoint(context).name, size=size_of(context).side, steps=steps, loras=loras or ())


def workload(context: Context) -> Workload:
    """What a server and a host need; its graph is the long one. The file is in the page cache afterwards."""
    file = checkpoint(context)
    comfy = checkpoints.comfy_root(context.comfyui)
    long = graph(context, size_of(context).long)
    work = Workload(file, file.parent.parent, long, comfy, cpu=context.dry, environment=environment_of(context))
    work.warm()
    return work


def device_of(context: Context) -> str:
    """Where ComfyUI's host keeps its bytes: in a dry run ComfyUI is on the CPU, so its host is, too."""
    return "cpu" if context.dry else context.device


def environment_of(context: Context) -> dict[str, str]:
    """Of ComfyUI's processes. Toys: threads that wait for each other stall tiny steps on a busy machine."""
    return {"OMP_NUM_THREADS": "1"} if context.dry else {}


def log_tail(server: ComfyServer, lines: int = 12) -> str:
    """The last lines of a server's log, for a note."""
    return "\n".join(server.log_text().splitlines()[-lines:])


def make(context: Context) -> Measured:
    """The step that makes the checkpoint, so that no other step's time has it."""
    began = time.monotonic()
    file = checkpoint(context)
    made_s = time.monotonic() - began
    began = time.monotonic()
    read_through(file)
    read_s = time.monotonic() - began
    nbytes = file.stat().st_size
    figures = [
        Figure("checkpoint, size", nbytes / GB, "GB"),
        Figure("checkpoint, making it (0: it was there)", made_s if made_s > 0.5 else 0.0, "s"),
        Figure("checkpoint, reading it from the page cache", nbytes / GB / read_s, "GB/s"),
    ]
    return Measured(figures, facts={"checkpoint": file.name})
