"""``lunashm status``, ``clients`` and ``stop``: the host itself and who is connected to it."""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import Annotated

import typer
from rich.panel import Panel

from lunashm import __version__
from lunashm import protocol as p
from lunashm.cli.hosts import DeviceFlag, EndpointFlag, ask, ask_once, connected, every, one
from lunashm.cli.output import AsJson, Output, add, clean, columns, count, duration, facts, size
from lunashm.errors import HostLost, HostTimeout
from lunashm.paths import Endpoint, find_host
from lunashm.process import namespace
from lunashm.protocol import HostInfo

_LOOK_S = 0.05


def status(endpoint: EndpointFlag = None, device: DeviceFlag = None, as_json: AsJson = False) -> None:
    """Show what each host does: memory, models, clients, what went wrong."""
    statuses = [ask_once(address, p.GetStatus(), p.Status) for address in every(endpoint, device)]
    value = {
        "version": __version__,
        "hosts": [{name: getattr(s, name) for name in s.__struct_fields__} for s in statuses],
    }
    panels = [
        Panel(facts(_facts(s)), title=clean(f"lunashm host for {s.host.device_name}"), title_align="left", expand=False)
        for s in statuses
    ]
    Output(as_json).result(value, *panels)


def _facts(s: p.Status) -> dict[str, str]:
    loading = sum(model.state == "loading" for model in s.models)
    models = f"{len(s.models)}" + (f", {loading} of them loading" if loading else "")
    version = s.host.version + ("" if s.host.version == __version__ else f" (this command: {__version__})")
    return {
        "process": f"pid {s.host.pid}, up {duration(s.uptime_s)}, version {version}",
        "endpoint": s.host.endpoint,
        "device": s.host.device if s.host.device != s.host.device_name else "",
        "memory": f"{size(s.shared_nbytes)} shared ({s.host.rung}), {size(s.free_nbytes)} free",
        "why so": s.host.rung_reason,
        "saved": size(s.saved_nbytes),
        "models": models,
        "clients": f"{s.clients}, holding {count(s.leases, 'lease')}",
        "roots": "\n".join(s.host.roots),
        "counters": "\n".join(f"{name} {number}" for name, number in sorted(s.counters.items())),
    }


def clients(endpoint: EndpointFlag = None, device: DeviceFlag = None, as_json: AsJson = False) -> None:
    """List the processes that are connected and what each holds."""
    found = [
        (address, client)
        for address in every(endpoint, device)
        for client in ask_once(address, p.ListClients(), p.Clients).clients
    ]
    value = {"clients": [{"endpoint": address.url, **_fields(client)} for address, client in found]}
    table = columns("PID", "KIND", "LABEL", "MODELS", "CONNECTED", "SEEN", right=("PID",))
    for _, client in found:
        info = client.info
        models = ", ".join(dict.fromkeys(lease.model for lease in client.leases)) or "-"
        seen = "alive" if client.watched == "process" else f"{duration(client.last_seen_s)} ago"
        add(table, str(info.pid), info.kind, info.label or "-", models, duration(client.since_s), seen)
    Output(as_json).result(value, table if found else "no clients are connected")


def _fields(client: p.ClientStatus) -> dict[str, object]:
    return {name: getattr(client, name) for name in client.__struct_fields__}


def stop(
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="How long it may take.")] = 30.0,
    endpoint: EndpointFlag = None,
    device: DeviceFlag = None,
    as_json: AsJson = False,
) -> None:
    """Stop a host and wait until it is gone. Clients keep what they have mapped."""
    address = one(endpoint, device)
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(connected(address))
        host = connection.host
        pidfd = _pidfd(host)
        if pidfd is not None:
            stack.callback(os.close, pidfd)
        with contextlib.suppress(HostLost):  # gone before its answer was
            ask(connection, p.Shutdown(), p.Done)
        if not _gone(address, host, pidfd, deadline):
            raise HostTimeout(f"host pid {host.pid} is still there after {timeout:g} s; end it with: kill {host.pid}")
    Output(as_json).result({"stopped": True, "pid": host.pid, "endpoint": address.url}, f"stopped host pid {host.pid}")


def _pidfd(host: HostInfo) -> int | None:
    """Of the host's process, taken while it lives; None where we cannot see it."""
    try:
        return os.pidfd_open(host.pid) if host.pid_namespace == namespace() else None
    except OSError:
        return None


def _gone(address: Endpoint, host: HostInfo, pidfd: int | None, deadline: float) -> bool:
    """Whether the endpoint's lock and, where we can see it, the process are gone by ``deadline``."""
    while (found := find_host(address)) is not None and found.host_id == host.host_id:
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_S)
    left_s = max(deadline - time.monotonic(), 0.0)
    return pidfd is None or bool(select.select([pidfd], [], [], left_s)[0])
