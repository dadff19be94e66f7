"""What a LoRA's name means: names in, files out. Knows no disk: whatever is found is one of the files it was given.

The first of these that fits: the file's name relative to its folder, the same without extension, either in other
letters' case, and then all four again for a file in a subfolder. Slashes may be backslashes.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

_WAYS = [(below, folded, bare) for below in (False, True) for folded in (False, True) for bare in (False, True)]


@dataclass(frozen=True)
class Found:
    """``file`` is None if there is none; ``others`` fit as well as it."""

    file: str | None = None
    others: tuple[str, ...] = ()

    @property
    def doubt(self) -> str:
        """``could be a/x.safetensors or b/x.safetensors; ...``; empty where the name means one file only."""
        if not self.others:
            return ""
        *most, last = sorted((str(self.file), *self.others))
        return f"could be {', '.join(most)} or {last}; {self.file} is used, write its folder and extension to be sure"


def find(name: str, files: Iterable[str]) -> Found:
    """``files``: relative to their folders, as ComfyUI lists them. Of several that fit equally well the one in the
    fewest folders is taken, safetensors before others, then by the alphabet.
    """
    wanted = _normal(name)
    if not wanted or ".." in wanted.split("/"):
        return Found()
    fits: dict[int, list[str]] = {}
    somehow = _fold(wanted)
    for file in files:
        path = _normal(file)
        way = _way(wanted, path) if somehow in _fold(path) else None
        if way is not None:
            fits.setdefault(way, []).append(file)
    if not fits:
        return Found()
    first, *others = sorted(fits[min(fits)], key=_preference)
    return Found(first, tuple(others))


def closest(name: str, files: Iterable[str]) -> str | None:
    """The file that a misspelt name may mean."""
    by_name = {_fold(_bare(_normal(file)).rpartition("/")[2]): file for file in sorted(files, reverse=True)}
    wanted = _fold(_bare(_normal(name)).rpartition("/")[2])
    close = difflib.get_close_matches(wanted, by_name, n=1)
    return by_name[close[0]] if close else None


def _way(wanted: str, path: str) -> int | None:
    """Index in _WAYS of the strictest way in which the path fits."""
    for index, (below, folded, bare) in enumerate(_WAYS):
        have = _bare(path) if bare else path
        have, want = (_fold(have), _fold(wanted)) if folded else (have, wanted)
        if have == want or (below and have.endswith(f"/{want}")):
            return index
    return None


def _normal(name: str) -> str:
    """``.\\sub\\x`` and ``/sub/x`` are ``sub/x``."""
    parts = (part.strip() for part in name.replace("\\", "/").split("/"))
    return "/".join(part for part in parts if part not in ("", "."))


def _bare(path: str) -> str:
    return path.removesuffix(PurePosixPath(path).suffix)


def _fold(path: str) -> str:
    return unicodedata.normalize("NFC", path).casefold()


def _preference(file: str) -> tuple[int, bool, str]:
    path = _normal(file)
    return path.count("/"), not path.lower().endswith((".safetensors", ".sft")), path
