"""Client programs that do or see what nobody should (a host's death, a forbidden write), and some that hold memory."""

from __future__ import annotations

import gc
import os
import resource
import time
from collections.abc import Callable

import torch

from bench.gpu.saying import MS, Options, attach, compute, digest_by_driver, largest, logged, say, wait
from bench.gpu.torch_gpu import attempt, start_context, sum_of
from lunashm.memory import cuda
from lunashm.memory.cuda_device import device_of


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
        say({"driver copy": _counted(copies), "kernel": _counted(kernels), "context": attempt(compute)})
    del weight
    model.close()
    del model, mapping
    gc.collect()
    say({"logged while unmapping": logged, "context afterwards": attempt(compute)})


def _again(before: object, read: Callable[..., object], *arguments: object) -> str:
    seen: list[object] = []
    error = attempt(lambda: seen.append(read(*arguments)))
    return error or ("same" if seen == [before] else "other bytes")


def _counted(outcomes: list[str]) -> dict[str, int]:
    return {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}


def write(options: Options) -> None:
    """Writes where it may only read: ``way`` is kernel, copy or memset."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it is meant to crash
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
        "raised": raised, "torch afterwards": attempt(compute),
        "driver afterwards": attempt(lambda: digest_by_driver(mapping, 4096)),
        "reading afterwards": attempt(lambda: sum_of(weight)),
    })  # fmt: skip
    os._exit(0)  # the driver may hang in a process whose context is broken


def look(options: Options) -> None:
    """A digest of what it has mapped, by driver and by kernel, each time it is told."""
    model = attach(options)
    mapping, weight = model._mappings[0], largest(model)
    while True:
        error = attempt(compute)
        say({"error": error} if error else {"bytes": digest_by_driver(mapping, mapping.nbytes), "sum": sum_of(weight)})
        wait()


def hold(options: Options) -> None:
    """A context; then the model, read through; then the context alone again."""
    start_context()
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
    with device_of(cuda.resolve(options["device"])) as device:
        taken = 0
        room = min(device.free_and_total()[0] - options["leave"], options["most"])
        while taken + options["chunk"] <= room:
            device.call("cuMemsetD8", device.alloc(options["chunk"]), 0xA5, options["chunk"])
            taken += options["chunk"]
        device.synchronize()
        say({"taken": taken})
        wait()
