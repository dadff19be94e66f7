"""What code a result was taken with: a digest of the sources, as a machine with a GPU may have no git."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from bench.root import ROOT

MEASURED = ("lunashm", "comfy_ext", "bench", "tests/contracts", "tests/gpu", "tests/standin")


@functools.cache
def digest(root: Path = ROOT, folders: tuple[str, ...] = MEASURED) -> str:
    """Of all Python and C sources below ``folders``: their names and what is in them."""
    hasher = hashlib.sha256()
    for folder in folders:
        for file in sorted((root / folder).rglob("*")):
            if file.suffix in (".py", ".c", ".h"):
                hasher.update(f"{file.relative_to(root)}\0".encode())
                hasher.update(hashlib.sha256(file.read_bytes()).digest())
    return hasher.hexdigest()[:16]
