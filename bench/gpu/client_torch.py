"""Client programs that are timed, and those that try what torch makes of mapped memory."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable

import torch

import lunashm.client
from bench.gpu import torch_gpu
from bench.gpu.saying import MS, Options, attach, compute, largest, logged, say
from bench.gpu.torch_gpu import attempt, sum_of


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
    found["after letting go"] = attempt(torch.cuda.empty_cache) or attempt(compute)
    say(found | {"logged": logged})


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
