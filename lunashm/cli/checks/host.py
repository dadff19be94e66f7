"""The running hosts: do they answer, are they of this version, can they see who attaches from here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lunashm import __version__, paths, process, settings
from lunashm import protocol as p
from lunashm.cli.checks.check import Check, State, Task, Wanted
from lunashm.cli.hosts import ask_once
from lunashm.errors import LunashmError, ProtocolMismatch
from lunashm.paths import Endpoint, find_host
from lunashm.protocol import PROTOCOL_VERSION, HostInfo

_ANSWER_S = 60.0
"""A host that is loading answers late."""


def live() -> dict[Endpoint, HostInfo]:
    """Every live host in the runtime directory, and at the configured endpoint; none where these cannot be known."""
    try:
        chosen = settings.load()
        known = paths.all_endpoints()
        if chosen.endpoint:
            known.append(Endpoint.parse(chosen.endpoint))
    except LunashmError:
        return {}  # reported by the checks of settings and runtime directory
    return {endpoint: host for endpoint in known if (host := find_host(endpoint)) is not None}


def tasks(wanted: Wanted) -> Iterator[Task]:
    hosts = live()
    if not hosts:
        yield Task("host", lambda: nobody(wanted))
    for endpoint, info in hosts.items():
        yield Task("host", partial(answers, endpoint, info), _ANSWER_S)
        yield Task("host namespaces", partial(namespaces, info, wanted))


def nobody(wanted: Wanted) -> Check:
    command = "lunashm serve" if not wanted.only else f"lunashm serve --device {wanted.device}"
    return Check("host", State.WARN, "no host is running", f"start one with: {command}")


def answers(endpoint: Endpoint, info: HostInfo) -> Check:
    text = f"pid {info.pid} at {endpoint.url}: {info.device_name}, {info.rung}, version {info.version}"
    same = "install one version everywhere, then lunashm stop and lunashm serve"
    try:
        ask_once(endpoint, p.GetStatus(), p.Status)
    except ProtocolMismatch as exc:
        return Check("host", State.FAIL, f"{text}: {exc.message}", same)
    if info.version != __version__:
        return Check("host", State.FAIL, text, f"this command is {__version__}: {same}")
    return Check("host", State.OK, f"{text}, protocol {PROTOCOL_VERSION}")


def namespaces(info: HostInfo, wanted: Wanted, proc: Path = Path("/proc")) -> Check:
    """Whether the host sees who attaches from here end; if not, leases end by time-out, and cuda-ipc finds nothing."""
    name, who = "host namespaces", f"pid {info.pid}"
    if info.pid_namespace != process.namespace():
        text = (
            f"{who} is in another PID namespace: it cannot see a client from here end, so the lease of one that is "
            "killed ends by time-out, and cuda-ipc is impossible"
        )
        impossible = info.rung == "cuda-ipc"
        fix = "docker run --pid host, or --pid container:NAME of the host's"
        return Check(name, State.FAIL if impossible and wanted.on_gpu else State.WARN, text, fix)
    watched = process.pidfd_of(info.pid, info.pid_namespace)
    if watched is None:
        text = f"{who} cannot be watched from here: leases end by time-out only"
        return Check(name, State.WARN, text, "see the checks pidfd and proc")
    os.close(watched)
    if not _same_users(info.pid, proc):
        text = f"{who} is in another user namespace: its uids mean others here, and it may refuse clients from here"
        return Check(name, State.WARN, text, "docker run --userns host, for hosts and clients alike")
    return Check(name, State.OK, f"{who} is in this PID namespace: leases end with their processes")


def _same_users(pid: int, proc: Path) -> bool:
    """Also where that cannot be found out."""
    try:
        return os.path.samestat(os.stat(proc / str(pid) / "ns/user"), os.stat(proc / "self/ns/user"))
    except OSError:
        return True
