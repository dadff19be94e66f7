"""Checkpoints as long and of as many tensors as a step wants, with random bytes: for what does not look at values.

Kept in the scratch folder for the next step. Names are a UNet's in manner only.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

GB = 10**9
SDXL_NBYTES = 6_938_000_000
SDXL_TENSORS = 2515
"""SDXL base in fp16: UNet, two text encoders and a VAE."""

DRY_NBYTES = 4 << 20
DRY_TENSORS = 60

_SMALL = 1280
_PIECE = 64 << 20
_ITEMSIZE = {"F16": 2, "F32": 4}


def sdxl(scratch: Path, dry: bool) -> Path:
    """A file of the size of SDXL, toy sized in a dry run."""
    return made(scratch, "sdxl-sized", *((DRY_NBYTES, DRY_TENSORS) if dry else (SDXL_NBYTES, SDXL_TENSORS)))


def made(scratch: Path, name: str, nbytes: int, tensors: int, dtype: str = "F16") -> Path:
    """About ``nbytes`` in ``tensors``: two of three are small (norms, biases), the others share the bytes."""
    folder = scratch / "files"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{nbytes}-{tensors}-{dtype}.safetensors"
    if not path.exists():
        _write(path, nbytes, tensors, dtype)
    return path


def _write(path: Path, nbytes: int, tensors: int, dtype: str) -> None:
    header, total = _header(nbytes, tensors, dtype)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    piece = os.urandom(min(_PIECE, total))
    unfinished = path.with_suffix(f".{os.getpid()}.part")
    try:
        with open(unfinished, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for start in range(0, total, len(piece)):
                file.write(struct.pack("<Q", start) + piece[8 : min(len(piece), total - start)])
        os.truncate(unfinished, 8 + len(text) + total)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _header(nbytes: int, tensors: int, dtype: str) -> tuple[dict[str, object], int]:
    itemsize = _ITEMSIZE[dtype]
    large = range(0, tensors, 3)
    rest = nbytes - (tensors - len(large)) * _SMALL * itemsize
    columns = 640 if rest > len(large) * 640 * itemsize else 8
    rows = max(1, rest // (len(large) * columns * itemsize))
    header: dict[str, object] = {}
    end = 0
    for number in range(tensors):
        shape = [rows, columns] if number % 3 == 0 else [_SMALL]
        size = itemsize * (rows * columns if number % 3 == 0 else _SMALL)
        name = f"model.diffusion_model.blocks.{number // 3}.{('proj.weight', 'norm.weight', 'proj.bias')[number % 3]}"
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    return header, end
