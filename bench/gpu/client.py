"""What a client process does in the suite: ``python -m bench.gpu.client PROGRAM OPTIONS``, OPTIONS as JSON.

Each function below is a PROGRAM. It says JSON lines and waits where the step wants to do something meanwhile. What a
GPU does to it (errors, an end) is what the steps ask, so nothing here decides what is right.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import lunashm.client
from bench.gpu import torch_gpu
from bench.gpu.torch_gpu import attempt, sum_of
from lunashm.client.attachment import Attachment

MS = 1e3
_CHUNK = 64 << 20
_logged: list[str] = []

Options = dict[str, Any]


def say(value: object) -> None:
    print(json.dumps(value), flush=True)


def wait() -> None:
    """Until the step says so."""
    sys.stdin.readline()


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


# -- deaths ------------------------------------------------------------------------------------------------------------


def death(options: Options) -> None:
    """Reads before, and many times after the host has been killed: by the driver's copy, and by a kernel."""
    model = attach(options)
    mapping, weight = model._mappings[0], largest(model)
    nbytes = min(mapping.handle.nbytes, options["nbytes"])
    by_driver, by_kernel = digest_by_driver(mapping, nbytes), sum_of(weight)
    say({"rung": mapping.handle.rung, "fail_stop": model.fail_stop, "allocated": torch.cuda.memory_allocated()})
    wait()  # the host has been killed
    began = time.monotonic()
    while model.fail_stop and not model.lost and time.monotonic() - began < 10:
        pass
    noticed_ms = (time.monotonic() - began) * MS if model.fail_stop else None
    say({"noticed_ms": noticed_ms, "check": attempt(model.check)})
    for _ in range(2):  # at once, and when other processes have taken the memory that was freed
        wait()
        reads = range(options["reads"])
        copies = [_again(by_driver, digest_by_driver, mapping, nbytes) for _ in reads]
        kernels = [_again(by_kernel, sum_of, weight) for _ in reads]
        say({"driver copy": _counted(copies), "kernel": _counted(kernels), "context": attempt(_compute)})
    del weight
    model.close()
    del model, mapping
    gc.collect()
    say({"logged while unmapping": _logged, "context afterwards": attempt(_compute)})


def _again(before: object, read: Callable[..., object], *arguments: object) -> str:
    seen: list[object] = []
    error = attempt(lambda: seen.append(read(*arguments)))
    return error or ("same" if seen == [before] else "other bytes")


def _counted(outcomes: list[str]) -> dict[str, int]:
    return {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}


def _compute() -> None:
    torch.ones(1000, device=torch_gpu.device()).sum().item()


# -- violations --------------------------------------------------------------------------------------------------------


def write(options: Options) -> None:
    """Writes where it may only read: ``way`` is kernel, copy or memset."""
    from lunashm.memory.cuda_device import device_of  # noqa: PLC0415

    model = attach(options)
    mapping, weight = model._mappings[0], largest(model)
    gpu = device_of(mapping.handle.device)

    def by_driver(name: str, *arguments: object) -> None:
        with gpu as device:
            device.call(name, weight.data_ptr(), *arguments)
            device.synchronize()

    ways: dict[str, Callable[[], object]] = {
        "kernel": lambda: weight.view(torch.uint8).fill_(0xFF),
        "copy": lambda: by_driver("cuMemcpyHtoD", bytes(4096), 4096),
        "memset": lambda: by_driver("cuMemsetD8", 0xFF, 4096),
    }
    say("mapped")
    wait()
    raised = attempt(ways[options["way"]])
    say({
        "raised": raised, "torch afterwards": attempt(_compute),
        "driver afterwards": attempt(lambda: digest_by_driver(mapping, 4096)),
        "reading afterwards": attempt(lambda: sum_of(weight)),
    })  # fmt: skip
    os._exit(0)  # the driver may hang in a process whose context is broken


def look(options: Options) -> None:
    """A digest of what it has mapped, by driver and by kernel, each time it is told."""
    model = attach(options)
    mapping, weight = model._mappings[0], largest(model)
    while True:
        error = attempt(_compute)
        say({"error": error} if error else {"bytes": digest_by_driver(mapping, mapping.nbytes), "sum": sum_of(weight)})
        wait()


# -- attaching ---------------------------------------------------------------------------------------------------------


def first_attach(options: Options) -> None:
    """Milliseconds from the request to the state dict, and to the first kernel's answer, once in this process.

    ``context``: whether torch's context, and its kernels, are there before.
    """
    if options["context"]:
        torch_gpu.start_context()
    lunashm.client.attach  # noqa: B018 - imported now, not while it is timed
    gc.collect()
    began = time.perf_counter()
    tensors = attach(options).state_dict()
    ready = time.perf_counter()
    sum_of(next(iter(tensors.values()))[:1])
    torch.cuda.synchronize()
    used = time.perf_counter()
    say({"ready_ms": (ready - began) * MS, "used_ms": (used - began) * MS, "tensors": len(tensors)})


def attach_again(options: Options) -> None:
    """The same for each of ``files``, ``repeats`` times; each time it is mapped anew."""
    torch_gpu.start_context()
    for file in options["files"]:
        attach({"file": file}).close()  # connects
        ready_ms, used_ms = [], []
        for _ in range(options["repeats"]):
            gc.collect()
            began = time.perf_counter()
            model = attach({"file": file})
            tensors = model.state_dict()
            ready_ms.append((time.perf_counter() - began) * MS)
            sum_of(next(iter(tensors.values()))[:1])
            torch.cuda.synchronize()
            used_ms.append((time.perf_counter() - began) * MS)
            nbytes = model.nbytes
            model.close()
            del model, tensors
        say({"nbytes": nbytes, "ready_ms": ready_ms, "used_ms": used_ms})


# -- allocators --------------------------------------------------------------------------------------------------------


def allocator(options: Options) -> None:
    """A mapped tensor under the allocator that the environment chose: its address, a kernel, a stream, a graph."""
    torch_gpu.start_context()
    model = attach(options)
    mapping, weight = model._mappings[0], largest(model)
    device, inside = torch_gpu.device(), weight.data_ptr() - mapping.pointer
    flat = weight.reshape(-1).view(torch.uint8)[: 1 << 20]
    copy = flat.clone()
    found: dict[str, object] = {
        "allocator": torch.cuda.get_allocator_backend(), "rung": mapping.handle.rung,
        "pointer inside the mapping": 0 <= inside <= mapping.nbytes - weight.nbytes,
        "on": str(weight.device), "kernel reads what a copy has": bool(torch.equal(flat, copy)),
        "allocated by torch, bytes": torch.cuda.memory_allocated(),
    }  # fmt: skip
    x = copy.float()
    stream = torch.cuda.Stream(device=device)
    with torch.cuda.stream(stream):
        total = flat.sum(dtype=torch.int64)
    torch.cuda.synchronize()
    found["record_stream raised"] = attempt(functools.partial(weight.record_stream, stream))
    found["side stream computed the same"] = int(total.item()) == int(copy.sum(dtype=torch.int64).item())
    found["capture raised"] = attempt(functools.partial(_capture, flat, x, found))
    model.close()
    del model, weight, flat
    gc.collect()
    found["after letting go"] = attempt(torch.cuda.empty_cache) or attempt(_compute)
    say(found | {"logged": _logged})


def _capture(flat: torch.Tensor, x: torch.Tensor, found: dict[str, object]) -> None:
    """A graph that reads mapped memory, replayed twice, against the same outside of it."""
    expected = flat.float() + x
    graph, out = torch.cuda.CUDAGraph(), torch.empty_like(x)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        torch.add(flat.float(), x, out=out)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    found["graph replays the same"] = bool(torch.equal(out, expected))


# -- other loaders -----------------------------------------------------------------------------------------------------


def load_with(options: Options) -> None:
    """Seconds until every tensor of the file is on the device, by ``loader``; the context is there before."""
    torch_gpu.start_context()
    loaders = {"safetensors": _safetensors, "safetensors, then to()": _safetensors_to, "fastsafetensors": _fast}
    load = loaders[options["loader"]]()
    gc.collect()
    began = time.perf_counter()
    tensors = load(options["file"], str(torch_gpu.device()))
    torch.cuda.synchronize()
    took_s = time.perf_counter() - began
    say({"took_s": took_s, "nbytes": sum(tensor.nbytes for tensor in tensors.values()), "tensors": len(tensors)})


_Loader = Callable[[str, str], dict[str, torch.Tensor]]


def _safetensors() -> _Loader:
    from safetensors.torch import load_file  # noqa: PLC0415

    return lambda file, device: load_file(file, device=device)


def _safetensors_to() -> _Loader:
    from safetensors.torch import load_file  # noqa: PLC0415

    return lambda file, device: {name: tensor.to(device) for name, tensor in load_file(file).items()}


def _fast() -> _Loader:
    """fastsafetensors without GPUDirect Storage, which few machines have."""
    from fastsafetensors import fastsafe_open  # type: ignore[import-not-found] # noqa: PLC0415

    def load(file: str, device: str) -> dict[str, torch.Tensor]:
        opened = fastsafe_open(filenames=[file], device=device, nogds=True)
        load.opened = opened  # type: ignore[attr-defined] # the tensors are views of its buffers
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict

    return load


# -- memory ------------------------------------------------------------------------------------------------------------


def hold(options: Options) -> None:
    """A context; then the model, read through; then the context alone again."""
    torch_gpu.start_context()
    say("context")
    wait()
    model = attach(options)
    say({"rung": model._mappings[0].handle.rung, "nbytes": model.nbytes, "sum": sum_of(largest(model))})
    wait()
    model.close()
    del model
    gc.collect()
    say("closed")
    wait()


def fill(options: Options) -> None:
    """Takes what is free on the device, less ``leave`` bytes and at most ``most``, and writes over all of it."""
    from lunashm.memory import cuda  # noqa: PLC0415
    from lunashm.memory.cuda_device import device_of  # noqa: PLC0415

    with device_of(cuda.resolve(options["device"])) as device:
        taken = 0
        room = min(device.free_and_total()[0] - options["leave"], options["most"])
        while taken + options["chunk"] <= room:
            device.call("cuMemsetD8", device.alloc(options["chunk"]), 0xA5, options["chunk"])
            taken += options["chunk"]
        device.synchronize()
        say({"taken": taken})
        wait()


PROGRAMS = {each.__name__: each for each in (death, write, look, first_attach, attach_again, allocator, load_with, hold, fill)}


class _Listener(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        _logged.append(record.getMessage()[:300])


def main(program: str, options: str) -> None:
    found = json.loads(options)
    logging.getLogger("lunashm").addHandler(_Listener(logging.WARNING))
    torch_gpu.use(found["device"], found["dry"])
    PROGRAMS[program](found)


if __name__ == "__main__":
    main(*sys.argv[1:])
