"""What a client with torch does with memory on a GPU: ``python -m tests.gpu.client WHAT HANDLE DESCRIPTOR``.

Each function here is one WHAT; the tests beside this file say what is expected of it.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import torch

from lunashm.memory import cuda, gpus, open_handle
from lunashm.protocol import Handle
from tests.gpu.weights import SIDE


class Client:
    """``device``: torch's name for the GPU that the handle names by its UUID."""

    def __init__(self, handle: Handle, descriptor: int | None) -> None:
        self.handle = handle
        self.descriptor = descriptor
        self.device = torch.device("cuda", gpus.find(handle.device, cuda.devices()).ordinal)

    def map(self) -> Any:
        return open_handle(self.handle, self.descriptor)

    def tensor(self, mapping: Any) -> torch.Tensor:
        """All of it, as bytes."""
        return torch.as_tensor(mapping, device=self.device)

    def weights(self) -> torch.Tensor:
        """The mapping lives as long as they do."""
        return self.tensor(self.map()).view(torch.float32).view(SIDE, SIDE)


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


def wait() -> None:
    """Until the test says so."""
    sys.stdin.readline()


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()


def attempt(step: Callable[[], object]) -> str:
    """What it raised, or nothing."""
    try:
        step()
        torch.cuda.synchronize()
    except Exception as exc:  # noqa: BLE001 - what it is, is the question
        return f"{type(exc).__name__}: {exc}"
    return ""


# -- views -------------------------------------------------------------------------------------------------------------


def view(client: Client) -> None:
    """Facts about a tensor of the whole mapping, then its end, step by step."""
    ends: list[int] = []
    mapping = client.map()
    mapping.when_gone(lambda: ends.append(1))
    base = mapping.__cuda_array_interface__["data"][0]
    tensor = client.tensor(mapping)
    say({
        "dtype": str(tensor.dtype), "shape": list(tensor.shape), "on": tensor.device == client.device,
        "digest": digest(tensor), "at_base": tensor.data_ptr() == base,
    })  # fmt: skip
    part = torch.as_tensor(mapping.at(1024, 4096), device=client.device)
    say({"offset": part.data_ptr() - base, "nbytes": part.nbytes, "same": torch.equal(part, tensor[1024:5120])})
    del mapping, tensor
    gc.collect()
    say({"ends": len(ends), "digest": digest(part)})
    part = part[:16]  # a view of a view
    gc.collect()
    say({"ends": len(ends)})
    del part
    gc.collect()
    say({"ends": len(ends)})


def matmul(client: Client) -> None:
    """Mapped weights compute what private copies of them compute, whatever torch's allocator does meanwhile."""
    weights = client.weights()
    copies = weights.clone()
    generator = torch.Generator(client.device).manual_seed(1)
    equal = []
    for rows in (1, 16, 333, 4096):
        x = torch.randn(rows, SIDE, device=client.device, generator=generator)
        equal.append(torch.equal(x @ weights.T, x @ copies.T))
        half = x.half()
        equal.append(torch.equal(half @ weights.half(), half @ copies.half()))
        del x, half
        torch.cuda.empty_cache()
    before = digest(weights)
    del weights
    gc.collect()
    say({
        "allocator": torch.cuda.get_allocator_backend(), "equal": equal, "digest": before,
        "goes_on": bool(torch.isfinite(copies @ copies).all()),
    })  # fmt: skip


def record_stream(client: Client) -> None:
    """What torch does when it is told that a stream uses memory which its allocator did not make."""
    weights = client.weights()
    stream = torch.cuda.Stream(client.device)
    with torch.cuda.stream(stream):
        total = weights.sum()
    raised = attempt(functools.partial(weights.record_stream, stream))
    del weights
    gc.collect()
    say({"raised": raised, "at_release": attempt(torch.cuda.empty_cache), "computed": attempt(total.item)})


# -- others ------------------------------------------------------------------------------------------------------------


def write(client: Client) -> None:
    """A kernel that writes where it may only read."""
    tensor = client.tensor(client.map())
    say("mapped")
    wait()
    raised = attempt(functools.partial(tensor.fill_, 0xFF))
    say({"raised": raised, "later": attempt(lambda: torch.ones(1, device=client.device).sum())})
    os._exit(0)  # the driver may hang in a process whose context is broken


def compute(client: Client) -> None:
    """A digest of the weights and of a product with them, each time it is told, three times."""
    weights = client.weights()
    x = torch.ones(7, SIDE, device=client.device)
    for _ in range(3):
        say([digest(weights), digest(x @ weights)])
        wait()


def read_on(client: Client) -> None:
    """Reads all the time, before and after the owner is killed; says how that went."""
    tensor = client.tensor(client.map())
    first = digest(tensor)
    say(first)
    wait()  # the owner is dead when this returns
    digests: list[str] = []
    raised = ""
    while not raised and len(digests) < 50:
        raised = attempt(lambda: digests.append(digest(tensor)))
    same = digests.count(first)
    say({"same": same, "other": len(digests) - same, "raised": raised})
    os._exit(0)


# -- memory ------------------------------------------------------------------------------------------------------------


def cycles(client: Client) -> None:
    """Free memory of the whole device: before, with one mapping, and after 100 of them came and went."""

    def free() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info(client.device)[0]

    def cycle() -> None:
        tensor = client.tensor(client.map())
        assert int(tensor[0]) >= 0
        del tensor

    for _ in range(3):
        cycle()
    before = free()
    mapping = client.map()
    one = free()
    del mapping
    say({"before": before, "with_one": one})
    wait()
    for _ in range(100):
        cycle()
    say({"after": free()})
    wait()


PROGRAMS = {each.__name__: each for each in (view, matmul, record_stream, write, compute, read_on, cycles)}


def main(what: str, handle: str, descriptor: str) -> None:
    number = int(descriptor)
    decoded = msgspec.msgpack.decode(bytes.fromhex(handle), type=Handle)
    PROGRAMS[what](Client(decoded, None if number < 0 else number))


if __name__ == "__main__":
    main(*sys.argv[1:])
