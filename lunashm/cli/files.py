"""``lunashm ls``: the checkpoints on disk that a host may load."""

from __future__ import annotations

import datetime
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lunashm import protocol as p
from lunashm import settings
from lunashm.cli.hosts import DeviceFlag, EndpointFlag, ask_once, every
from lunashm.cli.output import AsJson, Output, add, columns, count, is_text, size
from lunashm.cli.serve import existing_roots
from lunashm.errors import HostUnavailable

BUDGET_S = 10.0
"""How long the disks may be searched."""

_SUFFIXES = (".safetensors", ".sft")
_PRUNED = {"site-packages", "node_modules", "__pycache__"}
_PSEUDO = {"/proc", "/sys", "/dev", "/run"}


@dataclass
class Scan:
    """A search for checkpoints below ``roots``. ``complete`` is False after the budget ran out."""

    roots: tuple[str, ...]
    budget_s: float = BUDGET_S
    clock: Callable[[], float] = time.monotonic
    complete: bool = True

    def files(self) -> Iterator[os.DirEntry[str]]:
        """Each file once, roots in order. Links to folders are not followed: they lead into a root or out of reach."""
        deadline = self.clock() + self.budget_s
        seen: set[tuple[int, int]] = set()
        pending = list(reversed(self.roots))
        while pending:
            if self.clock() > deadline:
                self.complete = False
                return
            folders = []
            for entry in _entries(pending.pop(), seen):
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name.lower().endswith(_SUFFIXES) and self._allowed(entry):
                    yield entry
            pending += reversed(folders)

    def _allowed(self, entry: os.DirEntry[str]) -> bool:
        """Whether the host would take it: a regular file in a root after following links, with a name that is text."""
        real = Path(os.path.realpath(entry.path))
        inside = any(real.is_relative_to(os.path.realpath(root)) for root in self.roots)
        return inside and is_text(f"{entry.path}{real}") and real.is_file()


def _entries(folder: str, seen: set[tuple[int, int]]) -> list[os.DirEntry[str]]:
    """A folder's entries by name: none of a virtual environment, a pseudo file system, or a folder seen before."""
    try:
        where = os.stat(folder)
        if folder in _PSEUDO or (where.st_dev, where.st_ino) in seen:
            return []
        seen.add((where.st_dev, where.st_ino))
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        return []  # not ours to read, or gone meanwhile
    if any(entry.name == "pyvenv.cfg" for entry in entries):
        return []
    return [entry for entry in entries if not entry.name.startswith(".") and entry.name not in _PRUNED]


def ls(endpoint: EndpointFlag = None, device: DeviceFlag = None, as_json: AsJson = False) -> None:
    """List the checkpoints on disk below the host's roots (without a host: below the configured ones)."""
    statuses = _statuses(endpoint, device)
    roots = tuple(dict.fromkeys(root for status in statuses for root in status.host.roots))
    if not statuses:
        roots = existing_roots(settings.load().roots)
    loaded = {model.path for status in statuses for model in status.models if model.state != "loading"}
    scan = Scan(roots)
    files = []
    table = columns("FILE", "SIZE", "MODIFIED", "LOADED", right=("SIZE",))
    for entry in scan.files():
        try:
            facts = entry.stat()
        except OSError:
            continue
        here = os.path.realpath(entry.path) in loaded
        when = datetime.datetime.fromtimestamp(facts[stat.ST_MTIME]).astimezone()
        files.append({"path": entry.path, "name": entry.name, "size": facts.st_size, "modified": when, "loaded": here})
        add(table, _short(entry.path), size(facts.st_size), f"{when:%Y-%m-%d %H:%M}", "yes" if here else "no")
    value = {"roots": roots, "files": files, "complete": scan.complete}
    where = ", ".join(map(_short, roots))
    total = f"{count(len(files), 'file')} below {where}" + ("" if statuses else " (no host is running)")
    if not scan.complete:
        total += f"; stopped after {scan.budget_s:g} s, there may be more: narrow the roots with --root"
    Output(as_json).result(value, *([table] if files else []), total)


def _statuses(endpoint: str | None, device: str | None) -> list[p.Status]:
    try:
        return [ask_once(address, p.GetStatus(), p.Status) for address in every(endpoint, device)]
    except HostUnavailable:
        return []


def _short(path: str) -> str:
    home = os.path.expanduser("~")  # noqa: PTH111 - unlike Path.home() it never fails
    return f"~{path.removeprefix(home)}" if path.startswith(home + "/") else path
