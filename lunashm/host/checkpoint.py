"""A safetensors file as the host sees it: validated header, tensor ranges, identity. Reads no tensor data.

The format: 8 bytes little-endian header length, a JSON object, then the data. Checked before anything is used:
the header fits the file; every range matches dtype and shape; ranges cover the data exactly, without overlap or
hole; no name appears twice. Not checked: what the numbers mean.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from lunashm.errors import InvalidCheckpoint, LunashmError, ModelNotFound, PathNotAllowed, UnsupportedFormat
from lunashm.manifest import MAX_EXTENT, Source, nbytes_of

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

    Raises PathNotAllowed, UnsupportedFormat or ModelNotFound, checked in this order: nothing about files outside the
    roots is revealed, not even whether they exist or where a link leads.
    """
    if not Path(path).is_absolute() or "\0" in path:
        raise PathNotAllowed(f"{path!r} is not an absolute path; give the host the whole path")
    real = Path(os.path.realpath(path))
    allowed = [Path(root) for root in roots]
    if not any(real.is_relative_to(root) for root in allowed):
        raise PathNotAllowed(
            f"{path}, or what it links to, is outside the host's roots ({', '.join(map(str, allowed)) or 'none'}); "
            f"restart the host with --root {Path(os.path.normpath(path)).parent}, or add it to roots in lunashm.toml"
        )
    suffixes = {Path(path).suffix.lower(), real.suffix.lower()}
    if suffixes & _PICKLES:
        raise UnsupportedFormat(
            f"{Path(path).name} is a pickle, which can run code when it is opened; convert it to .safetensors first"
        )
    if not suffixes & _SUFFIXES:
        raise UnsupportedFormat(f"{Path(path).name} is not a .safetensors or .sft file")
    if not _is_text(str(real)):
        raise UnsupportedFormat(f"{path} leads to a file whose name is not UTF-8; rename it")
    if not os.path.isfile(real):  # noqa: PTH113 - Path.is_file() raises where it may not look
        raise ModelNotFound(f"no such file: {path}")
    return real


def display_name(path: str, real: Path) -> str:
    """What to call the model: its file's name, or the link's where that alone says what it is (hashed stores)."""
    return real.name if real.suffix.lower() in _SUFFIXES else Path(path).name


def open_read(path: Path | str) -> int:
    """A descriptor of a regular file. Never follows a link: ``path`` is a real path already (I6).

    Raises ModelNotFound.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        raise unreadable(path, exc) from exc
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelNotFound(f"{path} is not a regular file")
    return fd


def unreadable(path: Path | str, exc: OSError) -> ModelNotFound:
    return ModelNotFound(f"cannot read {path}: {exc.strerror}")


def identify(path: Path) -> Source:
    """Which bytes ``path`` names right now. Raises ModelNotFound."""
    try:
        return source_of(path, os.stat(path))
    except OSError as exc:
        raise unreadable(path, exc) from exc


def source_of(path: Path | str, found: os.stat_result) -> Source:
    return Source(str(path), found.st_size, found.st_mtime_ns, found.st_ino)


def read(path: Path) -> Checkpoint:
    """Parse and validate the header. Raises ModelNotFound, InvalidCheckpoint or UnsupportedFormat."""
    with open(open_read(path), "rb") as file:
        try:
            source = source_of(path, os.fstat(file.fileno()))
            length = int.from_bytes(file.read(8), "little")
            if source.size < 8 or length > min(MAX_HEADER_BYTES, source.size - 8):
                raise InvalidCheckpoint(
                    f"{path.name}: header claims {length} bytes in a file of {source.size}; "
                    "truncated download, or not a safetensors file"
                )
            header = file.read(length)
        except OSError as exc:
            raise unreadable(path, exc) from exc
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
    if not isinstance(metadata, dict) or not all(map(_is_text, [*metadata, *metadata.values()])):
        raise InvalidCheckpoint(f"{name}: __metadata__ must map text to text")
    tensors = sorted((_tensor(key, entry, data_start, name) for key, entry in table.items()), key=_by_range)
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            raise InvalidCheckpoint(f"{name}: {tensor.name!r} starts at {tensor.start}, not {position}: overlap, hole")
        position = tensor.end
    if position != file_size:
        raise InvalidCheckpoint(
            f"{name}: tensors end at byte {position}, the file at {file_size}; truncated or damaged, download it again"
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


def _tensor(key: str, entry: Any, data_start: int, name: str) -> StoredTensor:  # noqa: ANN401 - what JSON held
    if not _is_text(key):
        raise InvalidCheckpoint(f"{name}: the tensor name {key!r} is not valid Unicode")
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise InvalidCheckpoint(f"{name}: entry {key!r} lacks dtype, shape or data_offsets") from None
    if not (isinstance(dtype, str) and isinstance(shape, list) and all(_is_size(n) for n in (*shape, start, end))):
        raise InvalidCheckpoint(f"{name}: entry {key!r} has a malformed dtype, shape or data_offsets")
    try:
        expected = nbytes_of(dtype, shape)
    except LunashmError as exc:
        raise type(exc)(f"{name}: {key!r}: {exc.message}") from exc
    if end - start != expected:
        raise InvalidCheckpoint(f"{name}: {key!r} is {dtype} {shape} but has {end - start} bytes")
    return StoredTensor(key, dtype, tuple(shape), data_start + start, data_start + end)


def _is_size(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MAX_EXTENT


def _is_text(value: object) -> TypeGuard[str]:
    """Whether it can be written as UTF-8: JSON's escapes allow half a surrogate pair, msgpack does not."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
