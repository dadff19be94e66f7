"""Several servers brought up at once: a start is mostly imports, and a machine with a GPU has cores to spare."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from bench.comfy_server import ComfyServer

AT_ONCE = 6
START_TIMEOUT_S = 240.0


def started(stack: ExitStack, servers: Sequence[ComfyServer]) -> list[ComfyServer]:
    """All of them, up and answering; `stack` ends them, those that did come up too when another did not."""
    for server in servers:
        server.start_timeout_s = START_TIMEOUT_S
        stack.callback(server.stop)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ComfyServer.start, servers))
