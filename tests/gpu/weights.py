"""A square of float32 weights in a segment, and what it must look like to whoever maps it."""

from __future__ import annotations

import hashlib

import torch

from tests.contracts.remote import RemoteRung, RemoteSegment

SIDE = 512
_CHUNK = 64 << 10


def data() -> bytes:
    """Small whole numbers, and no two rows alike."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-8, 9, (SIDE, SIDE), generator=generator).float().numpy().tobytes()


def shared(rung: RemoteRung) -> RemoteSegment:
    whole = data()
    segment = rung.allocate(len(whole))
    for offset in range(0, len(whole), _CHUNK):
        segment.write(offset, whole[offset : offset + _CHUNK])
    segment.freeze()
    return segment


def digest() -> str:
    return hashlib.sha256(data()).hexdigest()
