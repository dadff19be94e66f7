"""Random tensors and the safetensors file they stream into.

Owns the values and the bytes: a tensor's values follow from the seed, its name and its shape alone, and only
a few tensors at a time are in memory, however big the file is. Knows no architecture.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
WIRE = {torch.float16: "F16", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}

AHEAD = 4

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def fill(name: str, shape: Shape, seed: int, latent: tuple[float, float] = (1.0, 0.0)) -> torch.Tensor:
    """Random float32 (int64 for position_ids) that keeps activations near unit scale and images varied.

    `latent` is the scale and shift that a TAESD expects of its latents.
    """
    if name.endswith("position_ids"):
        return torch.arange(shape[-1], dtype=torch.int64).reshape(shape)
    if name.endswith(("vae_scale", "vae_shift")):
        return torch.tensor(latent[name.endswith("vae_shift")])
    generator = torch.Generator().manual_seed(
        int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")
    )
    values = torch.empty(shape).normal_(0.0, _std(name, shape), generator=generator)
    if len(shape) == 1 and not name.endswith("bias"):
        values += 1.0  # norm weights
    if name.endswith("taesd_decoder.19.weight"):  # its inputs are all positive: without this, one flat colour
        values -= values.mean((1, 2, 3), keepdim=True)
    if name.endswith("taesd_decoder.19.bias"):
        values += 0.5  # the decoder's output is an image in 0..1
    return values


def filled(shapes: Shapes, seed: int, latent: tuple[float, float], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """`fill` of each, in `dtype`, in order; made ahead by as many threads as there are cores, a few tensors each."""

    def make(name: str) -> torch.Tensor:
        values = fill(name, shapes[name], seed, latent)
        return values if values.dtype == torch.int64 else values.to(dtype)

    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        names, ahead = iter(shapes), deque[Future[torch.Tensor]]()
        for name in itertools.islice(names, AHEAD * cores):
            ahead.append(pool.submit(make, name))
        while ahead:
            yield ahead.popleft().result()
            for name in itertools.islice(names, 1):
                ahead.append(pool.submit(make, name))


def _std(name: str, shape: Shape) -> float:
    if len(shape) <= 1 or "token_embedding" in name:
        return 0.02
    if "position_embedding" in name:
        return 0.01
    if name.endswith("pos_embed"):
        return 0.5
    gain = 0.25 if name.endswith("taesd_decoder.19.weight") else 1.0  # its inputs are several units large
    return float(gain * math.prod(shape[1:]) ** -0.5)  # fan-in


def write(
    out: Path, shapes: Shapes, dtype: torch.dtype, tensors: Iterator[torch.Tensor], metadata: dict[str, str]
) -> int:
    """Stream tensors into a safetensors file that appears whole or not at all; returns its size in bytes."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, shape in shapes.items():
        kind = torch.int64 if name.endswith("position_ids") else dtype
        begin, end = end, end + math.prod(shape) * kind.itemsize
        header[name] = {"dtype": WIRE[kind], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for tensor in tensors:
                stored = tensor if tensor.dtype == torch.int64 else tensor.to(dtype)
                file.write(stored.reshape(-1).view(torch.uint8).numpy().data)
            size = file.tell()
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return size
