"""The LoRA files of this ComfyUI, and when a node that used some of them has to run again."""

from __future__ import annotations

import os

import folder_paths

from . import lora_names
from .lora_names import Found

FOLDER = "loras"


def listed() -> list[str]:
    """Relative to their folders. ComfyUI looks again whenever one of these changed."""
    files: list[str] = folder_paths.get_filename_list(FOLDER)
    return files


def find(name: str) -> Found:
    found = lora_names.find(name, listed())
    dangling = found.file is not None and folder_paths.get_full_path(FOLDER, found.file) is None
    return Found() if dangling else found  # ComfyUI lists links that lead nowhere, too


def path_of(file: str) -> str:
    """Raises FileNotFoundError."""
    path: str = folder_paths.get_full_path_or_raise(FOLDER, file)
    return path


def state(name: str) -> str:
    """What the name means now and which version of the file that is; the same text, the same LoRA."""
    found = find(name)
    try:
        stat = os.stat(path_of(found.file)) if found.file else None
    except OSError:
        stat = None
    return f"{found} {stat and (stat.st_size, stat.st_mtime_ns)}"


class Witness:
    """What the names meant to each node when it last ran. ComfyUI asks a node for a text before it takes the node's
    outputs from its cache, and shows it none of the inputs that come by a link; so it has to remember.
    """

    def __init__(self) -> None:
        self._seen: dict[str, dict[str, str]] = {}
        self._turns: dict[str, int] = {}

    def saw(self, node: str, names: list[str]) -> None:
        """To be called before the files are read: what changes meanwhile is read again."""
        self._seen.setdefault(node, {}).update((name, state(name)) for name in names)

    def turn(self, node: str) -> int:
        """Another number than last time if any name that this node ever used now means something else."""
        seen = self._seen.get(node, {})
        now = {name: state(name) for name in seen}
        if now != seen:
            self._seen[node] = now
            self._turns[node] = self._turns.get(node, 0) + 1
        return self._turns.get(node, 0)
