"""A safetensors file as the host sees it: validated header, tensor ranges, identity. Reads no tensor data.

The format: 8 bytes little-endian header length, a JSON object, then the data. Checked before anything is used:
the header fits the file; every range matches dtype and shape; ranges cover the data exactly, without overlap or
hole; no name appears twice. Not checked: what the numbers mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lunashm.errors import InvalidCheckpoint, ModelNotFound, PathNotAllowed, UnsupportedFormat
from lunashm.manifest import Source, nbytes_of

MAX_HEADER_BYTES = 100_000_000
"""safetensors' own limit."""

_SUFFIXES = {".safetensors", ".sft"}
_PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}


@dataclass(frozen=True)
class StoredTensor:
    """``start`` and ``end`` are byte offsets from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """``tensors`` in file order."""

    source: Source
    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, str]
    data_start: int


def resolve(path: str, roots: Iterable[str]) -> Path:
    """The real path of a file the host may open (I6).

    Raises ModelNotFound, PathNotAllowed (after following every link) or UnsupportedFormat, in this order of harmlessness:
    nothing about files outside the roots is revealed, not even whether they exist.
    """
    if not os.path.isabs(path) or "\0" in path:
        raise PathNotAllowed(f"{path!r} is not an absolute path; give the host the whole path")
    real = Path(os.path.realpath(path))
    allowed = [Path(root) for root in roots]
    if not any(real.is_relative_to(root) for root in allowed):
        raise PathNotAllowed(
            f"{path} is outside the host's roots ({', '.join(map(str, allowed)) or 'none'}); "
            f"restart the host with --root {real.parent}, or add it to roots in lunashm.toml"
        )
    if real.suffix.lower() in _PICKLES:
        raise UnsupportedFormat(
            f"{real.name} is a pickle, which can run code when it is opened; convert it to .safetensors first"
        )
    if real.suffix.lower() not in _SUFFIXES:
        raise UnsupportedFormat(f"{real.name} is not a .safetensors or .sft file")
    if not real.is_file():
        raise ModelNotFound(f"no such file: {path}")
    return real


def identify(path: Path) -> Source:
    """Which bytes ``path`` names right now. Raises ModelNotFound."""
    try:
        return _source(path, os.stat(path))
    except OSError as exc:
        raise ModelNotFound(f"cannot read {path}: {exc.strerror}") from exc


def _source(path: Path, stat: os.stat_result) -> Source:
    return Source(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)


def read(path: Path) -> Checkpoint:
    """Parse and validate the header. Raises ModelNotFound, InvalidCheckpoint or UnsupportedFormat."""
    try:
        with path.open("rb") as file:
            source = _source(path, os.fstat(file.fileno()))
            length = int.from_bytes(file.read(8), "little")
            if source.size < 8 or length > min(MAX_HEADER_BYTES, source.size - 8):
                raise InvalidCheckpoint(
                    f"{path.name}: header claims {length} bytes in a file of {source.size}; "
                    "truncated download, or not a safetensors file"
                )
            header = file.read(length)
    except OSError as exc:
        raise ModelNotFound(f"cannot read {path}: {exc.strerror}") from exc
    tensors, metadata = parse_header(header, data_start=8 + length, file_size=source.size, name=path.name)
    return Checkpoint(source, tensors, metadata, 8 + length)


def parse_header(
    header: bytes, *, data_start: int, file_size: int, name: str
) -> tuple[tuple[StoredTensor, ...], dict[str, str]]:
    """Tensors in file order, and ``__metadata__``. Raises InvalidCheckpoint or UnsupportedFormat."""
    try:
        table = json.loads(header.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as exc:
        raise InvalidCheckpoint(f"{name}: header is not valid JSON: {exc}") from exc
    if not isinstance(table, dict):
        raise InvalidCheckpoint(f"{name}: header is not a JSON object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InvalidCheckpoint(f"{name}: __metadata__ must map text to text")
    tensors = sorted((_tensor(key, entry, data_start, name) for key, entry in table.items()), key=_by_range)
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            raise InvalidCheckpoint(f"{name}: {tensor.name!r} starts at {tensor.start}, expected {position}: overlap or hole")
        position = tensor.end
    if position != file_size:
        raise InvalidCheckpoint(
            f"{name}: tensors end at byte {position}, the file at {file_size}; truncated or corrupted, download it again"
        )
    if not tensors:
        raise InvalidCheckpoint(f"{name}: holds no tensors")
    return tuple(tensors), metadata


def _by_range(tensor: StoredTensor) -> tuple[int, int]:
    return tensor.start, tensor.end


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name appears twice")
    return table


def _tensor(key: str, entry: Any, data_start: int, name: str) -> StoredTensor:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise InvalidCheckpoint(f"{name}: entry {key!r} lacks dtype, shape or data_offsets") from None
    if not (isinstance(dtype, str) and isinstance(shape, list) and all(_is_size(n) for n in (*shape, start, end))):
        raise InvalidCheckpoint(f"{name}: entry {key!r} has a malformed dtype, shape or data_offsets")
    if end - start != nbytes_of(dtype, shape):
        raise InvalidCheckpoint(f"{name}: {key!r} is {dtype} {shape} but has {end - start} bytes")
    return StoredTensor(key, dtype, tuple(shape), data_start + start, data_start + end)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
