"""What all programs of a client process use: saying JSON lines, waiting for the step, attaching, reading."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from typing import Any

import torch

import lunashm.client
from bench.gpu import torch_gpu
from lunashm.client.attachment import Attachment

MS = 1e3
_CHUNK = 64 << 20
logged: list[str] = []
"""Warnings and errors of lunashm in this process."""

Options = dict[str, Any]


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


def wait() -> None:
    """Until the step says so."""
    sys.stdin.readline()


def listen() -> None:
    logging.getLogger("lunashm").addHandler(_Listener(logging.WARNING))


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        logged.append(record.getMessage()[:300])


def attach(options: Options) -> Attachment:
    return lunashm.client.attach(options["file"])


def largest(model: Attachment) -> torch.Tensor:
    return max(model.state_dict().values(), key=lambda tensor: tensor.nbytes)


def digest_by_driver(mapping: Any, nbytes: int) -> str:  # noqa: ANN401 - of a rung's own class
    """Of the first bytes of a mapping, copied by the driver; nobody asks whether the host lives."""
    hasher = hashlib.sha256()
    for start in range(0, nbytes, _CHUNK):
        hasher.update(mapping.peek(start, min(_CHUNK, nbytes - start)))
    return hasher.hexdigest()


def compute() -> None:
    """Whether this process's context still works."""
    torch.ones(1000, device=torch_gpu.device()).sum().item()
