"""Small safetensors files, written byte by byte so that a test knows what is in them, or what is wrong with them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from lunashm.manifest import ITEMSIZE

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name -> dtype and shape."""

SMALL: Tensors = {"layer0.weight": ("F32", (8, 16)), "layer1.weight": ("F32", (16, 4)), "scale": ("BF16", ())}


def write(
    path: Path, tensors: Tensors = SMALL, *, seed: int = 0, metadata: dict[str, str] | None = None
) -> dict[str, bytes]:
    """A valid file of finite random numbers; returns each tensor's bytes as they are in it."""
    random = np.random.default_rng(seed)
    data = {name: _numbers(random, dtype, shape) for name, (dtype, shape) in tensors.items()}
    path.write_bytes(header_of(tensors, metadata) + b"".join(data.values()))
    return data


def header_of(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + ITEMSIZE[dtype] * prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    return framed(json.dumps(table).encode())


def framed(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


def touch(path: Path) -> None:
    """A later modification time, by a whole second, and nothing else."""
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 10**9))


def _numbers(random: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> bytes:
    count = prod(shape)
    floats = random.standard_normal(count)
    if dtype in ("F16", "F32", "F64"):
        return floats.astype({"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).tobytes()
    if dtype == "BF16":  # the upper half of a float32
        return (floats.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    if dtype == "C64":
        return floats.astype("<c8").tobytes()
    if dtype == "BOOL":
        return random.integers(0, 2, count, dtype=np.uint8).tobytes()
    if dtype.startswith("F8"):  # exponents that are neither infinite nor NaN
        return random.integers(0, 0x70, count, dtype=np.uint8).tobytes()
    return random.bytes(count * ITEMSIZE[dtype])
