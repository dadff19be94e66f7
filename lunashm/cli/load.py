"""``lunashm load``: have a file loaded before anyone needs it, and watch it come in."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lunashm import protocol as p
from lunashm import settings
from lunashm.cli.hosts import DeviceFlag, EndpointFlag, ask, one
from lunashm.cli.models import dtypes
from lunashm.cli.output import AsJson, Output, clean, console, count, is_text, rate, size
from lunashm.client.access import explained
from lunashm.client.connection import REPLY_S, Connection
from lunashm.errors import (
    HostTimeout,
    LunashmError,
    ModelNotFound,
    ModelNotReady,
    PathNotAllowed,
    UnsupportedFormat,
    from_code,
)
from lunashm.manifest import DtypeRule, check_rules
from lunashm.memory import CPU

_LOOK_S = 0.2
"""How often the wait for the answer wakes up, so that Ctrl-C is heard."""

Dtypes = Annotated[
    list[str] | None,
    typer.Option("--dtype", metavar="DTYPE|PREFIX=DTYPE", help="Convert: F32, or first_stage_model.=F32; repeatable."),
]
Wait = Annotated[
    float | None,
    typer.Option("--wait", metavar="SECONDS", help="Give up waiting after this long; 0: start it and return."),
]


For = Annotated[
    Literal["comfyui", "comfyui-cpu", "comfyui-gpu"] | None,
    typer.Option("--for", help="The dtypes a ComfyUI takes on the host's device, or on that, so that it attaches."),
]

_TEXT_ENCODERS = ("cond_stage_model.=F16", "conditioner.=F16", "text_encoders.=F16")

COMFYUI_CPU = ("F32", *_TEXT_ENCODERS)
"""ComfyUI 0.28 with --cpu: UNet and VAE in float32, the text encoders of a checkpoint in fp16."""

COMFYUI_GPU = ("first_stage_model.=BF16", "vae.=BF16", *_TEXT_ENCODERS)
"""ComfyUI 0.28 without flags on a GPU that computes in bf16 (Ampere and newer): UNets in half precision as stored."""


def load(
    file: Annotated[str, typer.Argument(help="A .safetensors or .sft file below the host's roots.")],
    *,
    dtype: Dtypes = None,
    for_: For = None,
    wait: Wait = None,
    endpoint: EndpointFlag = None,
    device: DeviceFlag = None,
    as_json: AsJson = False,
) -> None:
    """Load FILE into shared memory ahead of time, as stored unless told otherwise.

    A client that wants other dtypes has them loaded beside it: say --for comfyui, or what `lunashm show` says of a
    model it uses.
    """
    output = Output(as_json)
    wait_s = settings.load({"wait_s": wait}).wait_s
    path = str(Path(file).expanduser().absolute())
    if not is_text(path):
        raise UnsupportedFormat(f"{path!r} has bytes in its name that are not UTF-8; rename it")
    rules(dtype or [])  # before anybody is asked
    bar = _Bar(path)
    address = one(endpoint, device)
    with contextlib.ExitStack() as stack:
        connection = Connection(address, on_event=bar.follow)
        stack.callback(connection.close)
        if not as_json and bar.visible:
            stack.enter_context(bar.progress)
        request = p.Load(path, rules([*_comfyui(for_, connection.host.device), *(dtype or [])]), wait_s)
        try:
            reply = _await(connection, connection.submit(request), wait_s + REPLY_S)
        except PathNotAllowed as exc:
            raise explained(exc, path) from None
        except ModelNotReady:
            if wait_s > 0:
                raise
            output.result({"path": path, "state": "loading"}, f"loading {path} in the host; watch it with: lunashm ps")
            return
        except KeyboardInterrupt:
            stack.close()
            output.note(
                f"{path} goes on loading in the host; stop that with: "
                f"lunashm unload{address.flag} {Path(path).name}"
            )
            raise
        unused = _unused(connection, reply.model, dtype or [])
    model = reply.model
    if unused:
        output.note(f"no tensor's name begins with {' or '.join(map(repr, unused))}: that --dtype changed nothing")
    text = f"{model.name} was loaded already" if reply.was_loaded else f"loaded {model.name} in {_took(model)}"
    text += f": {count(model.tensors, 'tensor')}, {size(model.nbytes)} {dtypes(model)}, blake3 {model.digest[:12]}"
    output.result({"model": model, "was_loaded": reply.was_loaded}, text)


def _comfyui(what: str | None, device: str) -> tuple[str, ...]:
    """What ``--for`` means beside a host of ``device``."""
    if what is None:
        return ()
    on_cpu = what == "comfyui-cpu" or (what == "comfyui" and device == CPU)
    return COMFYUI_CPU if on_cpu else COMFYUI_GPU


def _unused(connection: Connection, model: p.ModelInfo, texts: list[str]) -> list[str]:
    """The prefixes among ``texts`` that no tensor of the model has; none where the host forgot it meanwhile."""
    prefixes = [rule.prefix for rule in rules(texts) if rule.prefix]
    if not prefixes:
        return []
    try:
        names = [spec.name for spec in ask(connection, p.ShowModel(model.name), p.ModelDetail).manifest.tensors]
    except ModelNotFound:
        return []
    return [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in names)]


def _took(model: p.ModelInfo) -> str:
    """``2.5 s (1.72 GB/s)``: of the file, whatever it was converted to."""
    try:
        speed = rate(Path(model.path).stat().st_size, model.load_s)
    except OSError:  # removed, or seen by the host alone
        speed = ""
    return f"{model.load_s:.1f} s" + (f" ({speed})" if speed else "")


def rules(texts: list[str]) -> tuple[DtypeRule, ...]:
    """``F32`` is for every tensor, ``PREFIX=F32`` for those whose name starts so; the rest stays as stored."""
    table = {"": ""}
    for text in texts:
        prefix, _, dtype = text.rpartition("=")
        table[prefix] = dtype.strip().upper()
    return check_rules(DtypeRule(prefix, dtype) for prefix, dtype in table.items())


def _await(connection: Connection, answer: Future[p.Reply], timeout_s: float) -> p.Loaded:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            reply = answer.result(_LOOK_S)
            break
        except FutureTimeout:
            if time.monotonic() > deadline:
                raise HostTimeout(f"host pid {connection.host.pid} did not answer within {timeout_s:g} s") from None
    if isinstance(reply, p.ErrorReply):
        raise from_code(reply.code, reply.message)
    if not isinstance(reply, p.Loaded):
        raise LunashmError(f"the host answered Load with {type(reply).__name__}")
    return reply


class _Bar:
    """Bytes, GB/s and time left, from the host's events; ``visible`` where somebody looks."""

    def __init__(self, path: str) -> None:
        screen = console(stderr=True)
        self.visible = screen.is_terminal
        self.progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(),
            TextColumn("{task.fields[speed]}"), TimeRemainingColumn(compact=True), console=screen, transient=True,
        )  # fmt: skip
        self._real = os.path.realpath(path)
        self._task = self.progress.add_task(clean(Path(path).name).plain, total=None, speed="")

    def follow(self, event: p.Event) -> None:
        """Called in the connection's thread with every event."""
        if isinstance(event, p.LoadProgress) and event.path == self._real:
            speed = rate(event.done, event.elapsed_s)
            self.progress.update(self._task, total=event.total or None, completed=event.done, speed=speed)
