"""What ``top`` shows of one look: hosts, their models, their processes, as wide as the screen. Asks nobody."""

from __future__ import annotations

from datetime import datetime

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from lunashm import protocol as p
from lunashm.cli.hosts import NONE
from lunashm.cli.models import loading_at
from lunashm.cli.output import clean, count, duration, size
from lunashm.usage.account import DeviceUse, HostUse, RamUse

NARROW = 80
"""Columns of a screen below which some of the table's are left out."""

_WORTH_SAYING = 10_000_000
"""Bytes that nobody maps: below this it is padding, and pages that nobody has read yet."""


def shown(hosts: tuple[HostUse, ...], width: int) -> Group:
    """All of one look."""
    if not hosts:
        return Group(clean(NONE))
    parts: list[RenderableType] = []
    for host in hosts:
        parts += ["", *_host(host, width < NARROW)] if parts else _host(host, width < NARROW)
    reasons = _reasons(hosts)
    return Group(*parts, *(["", *reasons] if reasons else []))


def _host(host: HostUse, narrow: bool) -> list[RenderableType]:
    parts: list[RenderableType] = [_title(host)]
    if host.trouble:
        parts.append(clean(host.trouble))
    if host.ram is not None:
        parts.append(_ram(host.ram))
    if host.device is not None:
        parts.append(_device(host, host.device))
    if host.unseen:
        parts.append(clean(f"the GPU's memory is not shown: {host.unseen}"))
    if host.models:
        parts += ["", _models(host.models, narrow)]
    if host.processes:
        parts += ["", _processes(host, narrow)]
    return parts


def _title(host: HostUse) -> Text:
    info = host.host
    if info is None:
        return Text("no host", style="bold")
    up = f", up {duration(host.uptime_s)}" if host.state == "up" else ""
    name = Text.assemble((clean(info.device_name).plain, "bold"))
    return name.append(f": {info.rung}, host pid {info.pid}{up}")


def _ram(use: RamUse) -> Text:
    text = Text(f"{size(use.total_nbytes)} in use", style="bold")
    whose = f" (PSS of the host and {count(use.clients, 'client')}"
    if use.unmapped_nbytes >= _WORTH_SAYING:
        whose += f", and {size(use.unmapped_nbytes)} of weights that these do not map"
    text.append(f"{whose})", style="not bold")
    if use.clients:
        text.append(f"; {size(use.unshared_nbytes)} if nothing were shared", style="not bold")
    if use.peak_nbytes is not None and use.peak_nbytes > use.total_nbytes:
        text.append(f"; peak {size(use.peak_nbytes)}", style="not bold")
    return text


def _device(host: HostUse, use: DeviceUse) -> Text:
    since = datetime.fromisoformat(use.since).strftime("%H:%M:%S")
    headline = f"{_signed(use.delta_nbytes)} since {since}, {_size(use.beyond_nbytes)} beyond the shared weights"
    text = Text(headline, style="bold")
    rest = f" ({size(host.weights_nbytes)}): the device has {size(use.used_nbytes)} of {size(use.total_nbytes)} in use"
    return text.append(rest, style="not bold")


def _models(models: tuple[p.ModelInfo, ...], narrow: bool) -> Table:
    right = ("SIZE", "CLIENTS") if narrow else ("SIZE", "CLIENTS", "SAVED")
    table = _table("MODEL", *right, "UNTIL", right=right)
    for model in models:
        loading = model.state == "loading"
        saved = [] if narrow else ["-" if loading else size(model.saved)]
        clients = "-" if loading else str(model.clients)
        _row(table, model.name, size(model.nbytes), clients, *saved, loading_at(model) if loading else model.until)
    return table


def _processes(host: HostUse, narrow: bool) -> Table:
    numbers = ["SHARED", "NVML", "PEAK"] if host.gpu else ["SHARED", "PRIVATE", *([] if narrow else ["PSS"]), "PEAK"]
    names = ("CLIENT", "MODELS") if narrow else ("KIND", "LABEL", "MODELS")
    table = _table("PID", *names, *numbers, right=("PID", *numbers))
    for use in host.processes:
        figures = {
            "SHARED": use.shared_nbytes, "PRIVATE": use.private_nbytes, "PSS": use.pss_nbytes,
            "NVML": use.nvml_nbytes, "PEAK": use.peak_nbytes,
        }  # fmt: skip
        who = (use.label or use.kind,) if narrow else (use.kind, use.label or "-")
        words = (str(use.process.pid), *who, ", ".join(use.models) or "-")
        _row(table, *words, *(_size(figures[name]) for name in numbers))
    return table


def _reasons(hosts: tuple[HostUse, ...]) -> list[RenderableType]:
    """Why some figures are missing, each reason once."""
    pids: dict[str, list[int]] = {}
    for use in (use for host in hosts for use in host.processes if use.unseen):
        pids.setdefault(use.unseen, []).append(use.process.pid)
    return [clean(f"- pid {', '.join(map(str, who))}: {reason}") for reason, who in pids.items()]


def _size(nbytes: int | None) -> str:
    if nbytes is None:
        return "-"
    return size(nbytes) if nbytes >= 0 else _signed(nbytes)


def _signed(nbytes: int) -> str:
    return f"{'-' if nbytes < 0 else '+'}{size(abs(nbytes))}"


def _table(*names: str, right: tuple[str, ...]) -> Table:
    """As ``ps`` has it, but every row is one line: figures are never cut, names are where the screen ends."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name in (*right, "UNTIL"))
    return table


def _row(table: Table, *cells: str) -> None:
    texts = [clean(cell) for cell in cells]
    for text in texts:
        text.no_wrap, text.overflow = True, "ellipsis"
    table.add_row(*texts)


class Fitted:
    """As much as the screen has lines for, and a word about the rest."""

    def __init__(self, content: RenderableType) -> None:
        self._content = content

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._content, options.update(height=None), pad=False)
        room = max(options.max_height, 1)
        for number, line in enumerate(lines if len(lines) <= room else lines[: room - 1]):
            yield from [Segment.line()] * (number > 0)
            yield from line
        if len(lines) > room:
            yield Segment.line()
            yield Text(f"... {len(lines) - room + 1} more lines; lunashm top --once shows all", no_wrap=True, end="")
