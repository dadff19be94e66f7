"""torch's CUDA as the suite's programs use it; in a dry run, on the CPU.

``dry()`` puts calls that do nothing in the place of those that need a GPU, after it has looked that torch has them and
takes the arguments they get. So the same lines run with and without a GPU, and a name that torch does not have shows.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
from collections.abc import Callable
from typing import Any

import torch

_device = torch.device("cuda", 0)
_pins = True


def use(device: str, dry: bool) -> None:
    """What :func:`device` is from now on; to be called first."""
    global _device
    if dry:
        _go_dry()
    else:
        _device = torch.device(device)
        if _device.index:  # for the first one it would only make the context, which some programs time
            torch.cuda.set_device(_device)


def device() -> torch.device:
    return _device


def start_context() -> None:
    """Make the context, and load the kernels that are used later: what a process does once, at their first use."""
    sum_of(torch.zeros(16, dtype=torch.float16, device=_device).add_(1))
    torch.cuda.synchronize()


def pinned(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8).pin_memory() if _pins else torch.zeros(nbytes, dtype=torch.uint8)


def attempt(step: Callable[[], object]) -> str:
    """What it raised, by the time the device was done with it; empty if nothing."""
    try:
        step()
        torch.cuda.synchronize()
    except Exception as exc:  # noqa: BLE001 - what it is, is the question
        return f"{type(exc).__name__}: {' '.join(str(exc).split())[:300]}"
    return ""


def sum_of(tensor: torch.Tensor) -> int:
    """Over all bytes, by a kernel that reads each of them."""
    return int(tensor.reshape(-1).view(torch.uint8).sum(dtype=torch.int64).item())


# -- without a GPU -----------------------------------------------------------------------------------------------------


def _go_dry() -> None:
    global _device, _pins
    _device, _pins = torch.device("cpu"), False
    _stand_in(torch.cuda, "synchronize", lambda *_, **__: None)
    _stand_in(torch.cuda, "empty_cache", lambda: None)
    _stand_in(torch.cuda, "memory_allocated", lambda *_, **__: 0)
    _stand_in(torch.cuda, "Stream", lambda *_, **__: None)
    _stand_in(torch.cuda, "stream", lambda *_: contextlib.nullcontext())
    _stand_in(torch.cuda, "CUDAGraph", lambda *_, **__: _Graph())
    _stand_in(torch.cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    _views_of_ram()


def _stand_in(owner: Any, name: str, instead: Callable[..., Any]) -> None:  # noqa: ANN401 - modules have no type
    real = getattr(owner, name)  # AttributeError: this torch has no such name
    try:
        signature: inspect.Signature | None = inspect.signature(real)
    except ValueError:  # written in C
        signature = None

    def checked(*arguments: Any, **options: Any) -> Any:  # noqa: ANN401
        if signature is not None:
            signature.bind(*arguments, **options)
        return instead(*arguments, **options)

    setattr(owner, name, checked)


class _Graph:
    def replay(self) -> None:
        assert hasattr(torch._C._CUDAGraph, "replay")


def _views_of_ram() -> None:
    """Memory on the stand-in driver is memory of this machine, and torch has no CUDA here: views are CPU tensors."""
    import lunashm.views  # noqa: PLC0415 - not every program is a client

    def tensor_at(mapping: Any, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:  # noqa: ANN401
        nbytes = dtype.itemsize * torch.Size(shape).numel()
        piece = mapping.at(offset, nbytes)
        if not nbytes:
            return torch.empty(shape, dtype=dtype)
        window = (ctypes.c_char * nbytes).from_address(piece.pointer)
        window.piece = piece  # type: ignore[attr-defined] # keeps the mapping
        return torch.frombuffer(window, dtype=dtype).view(shape)

    setattr(lunashm.views, "tensor_at", tensor_at)  # noqa: B010 - it is imported there, not exported
