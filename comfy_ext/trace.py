"""What a stock loader did with a file: which parameter got which of the file's tensors, and in which dtype.

The stock loader runs unchanged on its own memory-mapped view of the file, so detection and conversion are stock's.
``load_state_dict`` assigns instead of copying while a trace is active in the thread: a parameter that ends up inside
the file's mapping came from it untouched, and its dtype before the assignment is the one stock would have made.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

_active = threading.local()


class UntraceableError(Exception):
    """The file holds something whose parameters cannot be put in place from outside; the message says what."""


@dataclass(frozen=True)
class FileIdentity:
    """Which bytes a path named when the loader opened it."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str) -> FileIdentity:
        real = os.path.realpath(path)
        stat = os.stat(real)
        return cls(real, stat.st_size, stat.st_mtime_ns)


class FileTensors:
    """The tensors of one opened file, findable by address. Holds them, so that no address is reused meanwhile."""

    def __init__(self, identity: FileIdentity, tensors: Mapping[str, torch.Tensor]) -> None:
        self.identity = identity
        self.tensors = dict(tensors)
        spans = sorted((t.data_ptr(), name) for name, t in self.tensors.items() if t.nbytes and t.is_contiguous())
        self._starts = [start for start, _ in spans]
        self._names = [name for _, name in spans]

    def locate(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """``(name, first element)`` of the file tensor that ``tensor`` lies in, or None."""
        index = bisect_right(self._starts, tensor.data_ptr()) - 1
        if index < 0 or not tensor.nbytes:
            return None
        name = self._names[index]
        whole = self.tensors[name]
        start = tensor.data_ptr() - self._starts[index]
        if start + tensor.nbytes > whole.nbytes or tensor.dtype != whole.dtype:
            return None
        return name, start // whole.element_size()


@dataclass(frozen=True)
class Origin:
    """Where a tensor came from: ``start`` in elements of the file tensor ``name``."""

    file: FileTensors
    name: str
    start: int

    def stretch(self, shape: torch.Size) -> torch.Tensor:
        return self.file.tensors[self.name].view(-1)[self.start : self.start + shape.numel()].view(shape)


@dataclass
class Slot:
    """One parameter or buffer that a state dict was loaded into; ``dtype`` is what stock would leave there."""

    owner: torch.nn.Module
    name: str
    dtype: torch.dtype
    is_buffer: bool
    origin: Origin | None = None

    @property
    def key(self) -> tuple[int, str]:
        return id(self.owner), self.name

    @property
    def tensor(self) -> torch.Tensor:
        table = self.owner._buffers if self.is_buffer else self.owner._parameters
        tensor = table[self.name]
        if tensor is None:
            raise UntraceableError(f"{type(self.owner).__name__}.{self.name} vanished while it was loaded")
        return tensor


@dataclass
class Trace:
    """One stock loader call. Use as a context manager around it, in the thread that makes it."""

    files: list[FileTensors] = field(default_factory=list)
    _slots: dict[tuple[int, str], Slot] = field(default_factory=dict)

    def __enter__(self) -> Trace:
        _active.trace = self
        return self

    def __exit__(self, *exc: object) -> None:
        _active.trace = None

    @property
    def slots(self) -> list[Slot]:
        return list(self._slots.values())

    def saw_file(self, path: str, identity: FileIdentity, tensors: Mapping[str, torch.Tensor]) -> None:
        """A state dict was read. Raises UntraceableError for quantised checkpoints."""
        for name in tensors:
            if name.endswith((".comfy_quant", ".scaled_fp8", "scaled_fp8", ".scale_weight", ".weight_scale")):
                raise UntraceableError(f"{path} is a quantised checkpoint ({name}), which cannot be shared yet")
        self.files.append(FileTensors(identity, tensors))

    def locate(self, tensor: torch.Tensor) -> Origin | None:
        """Where in the files seen so far ``tensor`` lies, or None. Only dense tensors count."""
        for file in self.files:
            found = file.locate(tensor) if tensor.is_contiguous() else None
            if found is not None:
                return Origin(file, *found)
        return None

    def before_load(self, module: torch.nn.Module, keys: Mapping[str, Any]) -> list[Slot]:
        """``module`` is about to be loaded from a state dict with ``keys``: note the dtypes it was built with."""
        slots = []
        for path, owner in module.named_modules():
            prefix = f"{path}." if path else ""
            for table, is_buffer in ((owner._parameters, False), (owner._buffers, True)):
                for name, tensor in table.items():
                    if tensor is not None and prefix + name in keys:
                        # a second load of the same module finds the first one's dtype: what it was built with counts
                        slot = Slot(owner, name, tensor.dtype, is_buffer)
                        slots.append(self._slots.setdefault(slot.key, slot))
        return slots

    def after_load(self, slots: list[Slot]) -> None:
        """The load is done: note what each slot was given."""
        for slot in slots:
            slot.origin = self.locate(slot.tensor)

    def settle(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        """``module`` as a whole ends up in ``dtype``, whatever its layers were built with (ComfyUI's VAE)."""
        modules = {id(owner) for owner in module.modules()}
        for slot in self._slots.values():
            if id(slot.owner) in modules and slot.dtype.is_floating_point:
                slot.dtype = dtype


def active() -> Trace | None:
    """The trace of the loader call this thread is in, if any."""
    return getattr(_active, "trace", None)


class TaggedStateDict(dict[str, torch.Tensor]):
    """A state dict that remembers its file, for VAE(), which is given a dict and no path."""

    identity: FileIdentity | None = None
    source: str = ""


def install_load_state_dict() -> None:
    """Make ``Module.load_state_dict`` tell the active trace; without one it is torch's own."""
    stock = torch.nn.Module.load_state_dict

    def load_state_dict(
        self: torch.nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        trace = active()
        if trace is None:
            return stock(self, state_dict, strict=strict, assign=assign)
        slots = trace.before_load(self, state_dict)
        result = stock(self, state_dict, strict=strict, assign=True)
        trace.after_load(slots)
        return result

    torch.nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
