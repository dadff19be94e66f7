"""Whether servers that should share really do: by the host's own list of who holds what, and the servers' logs.

A figure of a shared server is worth nothing when that server loaded its own copy. Nothing here is measured.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from bench.comfy_server import ComfyServer
from bench.host import HostProcess
from lunashm import protocol as p
from lunashm.cli.hosts import ask_once

LINE = re.compile(r"\[lunashm\].*")
SAYS = ("attached", "loaded locally", "sharing", "could not", "continues")


class NotShared(Exception):
    """A server that was to share has a copy of its own; the message has the reason from its log."""


def held(host: HostProcess) -> dict[int, int]:
    """By the pid of each client, the bytes of the models that it holds."""
    status = ask_once(host.endpoint, p.GetStatus(), p.Status)
    nbytes = {(model.name, model.generation): model.nbytes for model in status.models}
    found: dict[int, int] = {}
    for client in ask_once(host.endpoint, p.ListClients(), p.Clients).clients:
        models = {(lease.model, lease.generation) for lease in client.leases}
        found[client.info.pid] = sum(nbytes.get(model, 0) for model in models)
    return found


def shared_nbytes(host: HostProcess) -> int:
    """Of all segments of the host: the weights, however many share them."""
    return ask_once(host.endpoint, p.GetStatus(), p.Status).shared_nbytes


def said(server: ComfyServer) -> list[str]:
    """What the extension said about loads, newest last."""
    lines = [match[0].strip() for match in LINE.finditer(server.log_text())]
    return [line for line in lines if any(word in line for word in SAYS)]


def check(host: HostProcess, servers: Sequence[ComfyServer], file_nbytes: int) -> None:
    """Raises NotShared unless every server holds nearly all of the file's bytes and says of none that it is its own.

    Nearly: a checkpoint has parts that loaders make anew (projections) or drop.
    """
    holds = held(host)
    for number, server in enumerate(servers):
        own = [line for line in said(server) if "loaded locally" in line]
        nbytes = holds.get(server.pid, 0)
        if own or nbytes < 0.5 * file_nbytes:
            reason = own[-1] if own else "; ".join(said(server)[-3:]) or "its log has no line of the extension"
            raise NotShared(
                f"server {number} holds {nbytes / 1e9:.2f} GB of the host's {file_nbytes / 1e9:.2f} GB: {reason}"
            )


def patched(server: ComfyServer) -> list[str]:
    """How the extension said that LoRAs are applied, newest last."""
    return [match[0].strip() for match in LINE.finditer(server.log_text()) if " patched: " in match[0]]
