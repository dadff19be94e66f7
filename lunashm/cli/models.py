"""``lunashm ps``, ``show`` and ``unload``: the models a host holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import RenderableType
from rich.table import Table

from lunashm import protocol as p
from lunashm.cli.hosts import DeviceFlag, EndpointFlag, ask, ask_once, connected, every, one
from lunashm.cli.output import AsJson, Output, add, columns, count, duration, facts, rate, size
from lunashm.client.connection import Connection
from lunashm.errors import LunashmError, ModelNotFound
from lunashm.manifest import TensorSpec
from lunashm.memory import CPU
from lunashm.paths import Endpoint

_Answer = TypeVar("_Answer")

Name = Annotated[str, typer.Argument(help="Name, path, or the first 4 or more characters of the digest.")]


def ps(endpoint: EndpointFlag = None, device: DeviceFlag = None, as_json: AsJson = False) -> None:
    """List the loaded models and what sharing them saves."""
    statuses = [ask_once(address, p.GetStatus(), p.Status) for address in every(endpoint, device)]
    models = [(status.host, model) for status in statuses for model in status.models]
    saved = sum(status.saved_nbytes for status in statuses)
    value = {
        "hosts": [status.host for status in statuses],
        "models": [_where(host) | fields(model) for host, model in models],
        "saved_nbytes": saved,
    }
    output = Output(as_json)
    if not models:
        where = ", ".join(f"{s.host.endpoint} (pid {s.host.pid})" for s in statuses)
        flag = Endpoint.parse(statuses[0].host.endpoint).flag
        output.result(value, f"no models are loaded at {where}; load one with: lunashm load{flag} FILE")
        return
    several = len(statuses) > 1 or any(status.host.device != CPU for status in statuses)
    table = columns(
        *(["DEVICE"] if several else []), "NAME", "DIGEST", "SIZE", "DTYPE", "MEMORY", "CLIENTS", "SAVED", "UNTIL",
        right=("SIZE", "CLIENTS", "SAVED"),
    )  # fmt: skip
    for host, model in models:
        add(table, *([short_device(host.device)] if several else []), *_row(model))
    shared = sum(status.shared_nbytes for status in statuses)
    clients = sum(status.clients for status in statuses)
    total = f"saved {size(saved)}: {count(clients, 'client')}, {size(shared)} of shared memory"
    output.result(value, table, total)


def short_device(device: str) -> str:
    """Enough of a UUID to be a ``--device`` on any machine; ordinals are each process's own."""
    return device if device == CPU else device[:12]


def _where(host: p.HostInfo) -> dict[str, object]:
    return {"endpoint": host.endpoint, "device": host.device, "device_name": host.device_name}


def fields(model: p.ModelInfo) -> dict[str, object]:
    return {name: getattr(model, name) for name in model.__struct_fields__}


def _row(model: p.ModelInfo) -> tuple[str, ...]:
    if model.state == "loading":
        return (model.name, "-", size(model.nbytes), "-", model.rung, "-", "-", loading_at(model))
    return (
        model.name, model.digest[:12], size(model.nbytes), dtypes(model), model.rung, str(model.clients),
        size(model.saved), model.until,
    )  # fmt: skip


def loading_at(model: p.ModelInfo) -> str:
    """``loading 43% at 1.72 GB/s``."""
    speed = rate(model.loaded_nbytes, model.load_s)
    return f"loading {percent(model)}" + (f" at {speed}" if speed else "")


def percent(model: p.ModelInfo) -> str:
    return f"{100 * model.loaded_nbytes // max(model.nbytes, 1)}%"


def dtypes(model: p.ModelInfo) -> str:
    """``F16``, or ``F16+F32``, the one with most bytes first."""
    return "+".join(sorted(model.dtypes, key=lambda name: -model.dtypes[name])) or "-"


def show(
    name: Name,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor, too.")] = False,
    endpoint: EndpointFlag = None,
    device: DeviceFlag = None,
    as_json: AsJson = False,
) -> None:
    """Show what is known of one loaded model and who holds it."""
    output = Output(as_json)
    address = one(endpoint, device)
    with connected(address) as connection:
        try:
            detail = by_name(address, name, lambda each: ask(connection, p.ShowModel(each), p.ModelDetail))
        except ModelNotFound:
            model = _loading(connection, name)
            if model is None:
                raise
            output.result({"model": model}, facts({"name": model.name, "path": model.path, "state": _state(model)}))
            return
    model, manifest = detail.model, detail.manifest
    value: dict[str, object] = {
        "model": model, "source": _source(detail), "metadata": manifest.metadata, "held_by": detail.leases
    }  # fmt: skip
    if tensors:
        value["tensors"] = [
            {"name": t.name, "dtype": t.dtype, "stored": t.stored, "shape": t.shape, "nbytes": t.nbytes}
            for t in manifest.tensors
        ]
    about = {f"metadata {key}": text[:500] for key, text in sorted(manifest.metadata.items())}
    parts: list[RenderableType] = [facts(_facts(detail) | about)]
    if detail.leases:
        parts += ["", leases_table(detail.leases)]
    if tensors:
        parts += ["", _tensor_table(manifest.tensors)]
    output.result(value, *parts)


def _loading(connection: Connection, name: str) -> p.ModelInfo | None:
    models = ask(connection, p.ListModels(), p.Models).models
    return next((m for m in models if m.state == "loading" and name in (m.name, m.path)), None)


def by_name(address: Endpoint, name: str, ask_for: Callable[[str], _Answer]) -> _Answer:
    """Ask for a model as it was named; as a path from here, where that is one. Raises ModelNotFound, saying which other
    host has such a model."""
    try:
        return ask_for(name)
    except ModelNotFound as exc:
        path = os.path.realpath(Path(name).expanduser())
        if "/" in name and path != name and Path(path).exists():
            return ask_for(path)
        flags = [other.flag or " --device cpu" for other in every(None, None) if other != address and _has(other, name)]
        if not flags:
            raise
        raise ModelNotFound(f"{exc.message}; another host has it: add {' or'.join(flags).strip()}") from None


def _has(endpoint: Endpoint, name: str) -> bool:
    try:
        models = ask_once(endpoint, p.ListModels(), p.Models).models
    except LunashmError:
        return False
    return any(name in (model.name, model.path) for model in models)


def _state(model: p.ModelInfo) -> str:
    if model.state == "loading":
        return f"{loading_at(model)}, {size(model.nbytes)} in all"
    return f"{model.state}, until {model.until}"


def _source(detail: p.ModelDetail) -> dict[str, object]:
    source = detail.manifest.source
    return {"path": source.path, "size": source.size, "mtime_ns": source.mtime_ns}


def _facts(detail: p.ModelDetail) -> dict[str, str]:
    model = detail.model
    rules = ", ".join(f"{rule.prefix or 'all'} as {rule.dtype}" for rule in model.rules if rule.dtype)
    speed = rate(detail.manifest.source.size, model.load_s)
    return {
        "name": model.name,
        "path": model.path,
        "digest": f"blake3 {model.digest}",
        "generation": str(model.generation),
        "state": _state(model),
        "tensors": f"{model.tensors:,}",
        "size": f"{size(model.nbytes)} ({size(model.memory_nbytes)} of {model.rung} memory)",
        "dtypes": ", ".join(f"{name} {size(nbytes)}" for name, nbytes in sorted(model.dtypes.items())),
        "converted": rules,
        "loaded in": f"{model.load_s:.2f} s" + (f", {speed}" if speed else ""),
        "clients": f"{model.clients}, saving {size(model.saved)}",
    }


def leases_table(leases: tuple[p.LeaseInfo, ...]) -> Table:
    table = columns("PID", "KIND", "LABEL", "LEASE", "HELD", right=("PID", "LEASE"))
    for lease in leases:
        add(table, str(lease.pid), lease.kind, lease.label or "-", str(lease.lease), duration(lease.held_s))
    return table


def _tensor_table(tensors: tuple[TensorSpec, ...]) -> Table:
    table = columns("TENSOR", "DTYPE", "SHAPE", "SIZE", right=("SIZE",))
    for t in tensors:
        dtype = t.dtype if t.dtype == t.stored else f"{t.dtype} (from {t.stored})"
        add(table, t.name, dtype, "x".join(map(str, t.shape)) or "scalar", size(t.nbytes))
    return table


def unload(
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Ask the clients that hold it to let go.")] = False,
    endpoint: EndpointFlag = None,
    device: DeviceFlag = None,
    as_json: AsJson = False,
) -> None:
    """Give a model's memory back; refused while clients hold it."""
    address = one(endpoint, device)
    with connected(address) as connection:
        reply = by_name(address, name, lambda each: ask(connection, p.Unload(each, force), p.Unloaded))
    model = reply.model
    if model.state == "loading":
        text = f"stopped loading {model.name} at {percent(model)}"
    elif reply.freed:
        text = f"unloaded {model.name}: {size(model.memory_nbytes)} are free again"
    else:
        who = ", ".join(sorted({f"{lease.label or lease.kind} (pid {lease.pid})" for lease in reply.told}))
        text = (
            f"{model.name} is lent to nobody new; {size(model.memory_nbytes)} are freed when these let go: "
            f"{who or 'its last clients'}"
        )
    Output(as_json).result({"model": model, "freed": reply.freed, "told": reply.told}, text)
