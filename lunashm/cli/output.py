"""How results reach the user: one JSON value on stdout, or text and tables. Knows no host and no command.

Names, paths and labels come from files and other processes: they are shown as plain text, without markup and without
control characters, so none can move the cursor or colour the screen.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value, errors included, and nothing else.")]
"""The flag that every command has."""

_UNBOUNDED = 10_000
"""Columns of a pipe or file: nothing is cut where no screen ends."""


class Output:
    """Where one command's result goes. ``as_json``: exactly one value on stdout."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = console()

    def result(self, value: Any, *human: RenderableType) -> None:  # noqa: ANN401 - anything msgspec can encode
        """The command's one result: ``value`` for programs, ``human`` for people."""
        if self.as_json:
            print(encode(value), flush=True)
            return
        for part in human:
            self.console.print(clean(part) if isinstance(part, str) else part)

    def note(self, text: str) -> None:
        """A remark beside the result; people only."""
        if not self.as_json:
            console(stderr=True).print(clean(text))


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the screen, or unbounded where there is none. Rich itself obeys NO_COLOR."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else _UNBOUNDED, markup=False, highlight=False)


def failure(code: str, message: str, as_json: bool) -> None:
    """Why a command failed: JSON on stdout, else one line on stderr."""
    if as_json:
        print(encode({"error": {"code": code, "message": message}}), flush=True)
    else:
        console(stderr=True).print(Text("error: ", style="bold red") + clean(message))


def encode(value: Any) -> str:  # noqa: ANN401 - anything msgspec can encode
    return msgspec.json.encode(value).decode()


def clean(text: str) -> Text:
    """``text`` without control characters (line breaks stay), as rich text without markup."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))


def is_text(path: str) -> bool:
    """Whether a path from the file system is UTF-8: others cannot be sent to a host, nor be JSON."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def columns(*names: str, right: tuple[str, ...] = ()) -> Table:
    """An empty table in the style of ``ps``: a heading, no lines. Columns named in ``right`` hold numbers."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def add(table: Table, *cells: str) -> None:
    """One row of plain text."""
    table.add_row(*map(clean, cells))


def facts(rows: dict[str, str]) -> Table:
    """Two columns, name and value; rows without a value are left out."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value:
            add(table, name, value)
    return table


def size(nbytes: int) -> str:
    """Decimal units, as drives and ``torch`` checkpoints are sold: 4.27 GB, 352 MB, 12 B."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    digits = 0 if unit == "B" or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {unit}"


def rate(nbytes: int, seconds: float) -> str:
    """``1.72 GB/s``; nothing where no time has passed."""
    return f"{nbytes / 1e9 / seconds:.2f} GB/s" if seconds > 0 else ""


def count(number: int, noun: str) -> str:
    """``1 client``, ``3 clients``."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """The two largest units: 42 s, 3 min 7 s, 5 h 12 min, 2 d 4 h."""
    whole = int(seconds)
    for unit, below, length, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= length:
            return f"{whole // length} {unit} {whole % length // part} {below}"
    return f"{whole} s"
