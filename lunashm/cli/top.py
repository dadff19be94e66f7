"""``lunashm top``: who uses what, again and again. Hosts may come and go meanwhile; this process is no client."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from lunashm.cli.hosts import DeviceFlag, EndpointFlag, every, over_time
from lunashm.cli.output import AsJson, Output
from lunashm.cli.top_hosts import Hosts, Seen
from lunashm.cli.top_log import Log
from lunashm.cli.top_screen import Screen
from lunashm.cli.top_table import shown
from lunashm.client.connection import REPLY_S
from lunashm.errors import HostTimeout
from lunashm.paths import Endpoint
from lunashm.usage.account import HostUse
from lunashm.usage.watch import Watch

_PATIENCE_S = 1.0
"""How long one of many looks waits for hosts that do not answer."""


def _finite(seconds: float) -> float:
    if not math.isfinite(seconds):
        raise typer.BadParameter("it must be a number of seconds")
    return seconds


Interval = Annotated[
    float, typer.Option("--interval", metavar="SECONDS", min=0.1, callback=_finite, help="How often to look.")
]
ToFile = Annotated[
    Path | None,
    typer.Option("--csv", metavar="FILE", help="Append every look to FILE, until Ctrl-C, without a terminal, too."),
]
Once = Annotated[bool, typer.Option("--once", help="Look once: the default where the output is no terminal.")]


@dataclass(frozen=True)
class Look:
    """``time``: ISO 8601."""

    time: str
    hosts: tuple[HostUse, ...]


def top(
    interval: Interval = 1.0,
    csv: ToFile = None,
    once: Once = False,
    endpoint: EndpointFlag = None,
    device: DeviceFlag = None,
    as_json: AsJson = False,
) -> None:
    """Watch hosts, models and clients, and the memory they really use, until Ctrl-C.

    CPU: PSS, whose sum counts every page once. GPU: what the whole device gained since top started, and has beyond the
    shared weights; NVML's figures of single processes may count shared memory or not, so they are never added up.

    --json prints one value and ends, as everywhere; together with --csv one value a line, for every look.
    """
    output = Output(as_json)
    with contextlib.ExitStack() as stack:
        log = Log(csv) if csv is not None else None
        if log is not None:
            stack.callback(log.close)
        live = output.console.is_terminal and not output.console.is_dumb_terminal and not as_json
        if once or not (live or log):
            _once(output, log, every(endpoint, device))
            return
        looks = _Looks(over_time(endpoint, device), _PATIENCE_S)
        stack.callback(looks.close)
        with contextlib.suppress(KeyboardInterrupt):
            looks.begin()
            screen = stack.enter_context(Screen(output.console)) if live else None
            _go_on(looks, interval, output, screen, log)


def _once(output: Output, log: Log | None, endpoints: list[Endpoint]) -> None:
    with contextlib.closing(_Looks(lambda: endpoints, REPLY_S)) as looks:
        look = looks.take()
    if looks.seen and all(seen.trouble for seen in looks.seen):
        raise next(seen.trouble for seen in looks.seen if seen.trouble)
    if log is not None:
        log.append(look.time, look.hosts)
    output.result(look, shown(look.hosts, output.console.width))


def _go_on(looks: _Looks, interval: float, output: Output, screen: Screen | None, log: Log | None) -> None:
    """Until interrupted. A look that took too long is followed by the next one at once, not by those it missed."""
    due = time.monotonic()
    while True:
        look = looks.take()
        if log is not None:
            log.append(look.time, look.hosts)
        if output.as_json:
            output.result(look)
        due = max(due + interval, time.monotonic())
        if screen is None:
            time.sleep(max(0.0, due - time.monotonic()))
        else:
            screen.show(look.hosts)
            screen.wait(due - time.monotonic())


class _Looks:
    """One watching: the hosts that are meant, and what they and their clients use."""

    def __init__(self, find: Callable[[], list[Endpoint]], patience_s: float) -> None:
        self.seen: list[Seen] = []
        self._hosts = Hosts(find)
        self._watch = Watch()
        self._patience_s = patience_s

    def begin(self) -> None:
        self._watch.begin(_now())

    def take(self) -> Look:
        self.seen = self._hosts.look(self._patience_s)
        at = _now()
        return Look(at, tuple(self._use(seen, at) for seen in self.seen))

    def close(self) -> None:
        self._hosts.close()
        self._watch.close()

    def _use(self, seen: Seen, at: str) -> HostUse:
        """A host that is gone has no figures; of one that is silent the processes are looked at all the same."""
        status, trouble = seen.status, seen.trouble
        if status is not None and (trouble is None or isinstance(trouble, HostTimeout)):
            use = self._watch.use(status, seen.clients, at)
        else:
            use = HostUse(seen.endpoint.url, "up", host=status.host if status is not None else None)
        return use if trouble is None else replace(use, state=trouble.code, trouble=trouble.message)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
