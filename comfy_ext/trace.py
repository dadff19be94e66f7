"""What a stock loader did with a file: which parameter got which of the file's tensors, and in which dtype.

The stock loader runs unchanged on its own memory-mapped view of the file, so detection and conversion are stock's.
``load_state_dict`` assigns instead of copying while a trace is active in the thread: a parameter that ends up inside
the file's mapping came from it, and its dtype before the assignment is the one stock would have made.

A tensor that somebody wrote to since it was opened is not the file's any more. Torch counts writes (``_version``),
though not on inference tensors, so files are opened outside inference mode. Writes through ``.data`` go uncounted.
"""

from __future__ import annotations

import copy
import os
import threading
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from lunashm.views import NAMES

_active = threading.local()

_QUANTISED = (".comfy_quant", "scaled_fp8", ".scale_weight", ".weight_scale")


class UntraceableError(Exception):
    """The file holds something whose parameters cannot be put in place from outside; the message says what."""


@dataclass(frozen=True)
class FileIdentity:
    """Which bytes a path named when the loader opened it. Links are the host's to follow: it checks where they lead."""

    path: str
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: str) -> FileIdentity:
        stat = os.stat(path)
        return cls(os.path.abspath(path), stat.st_size, stat.st_mtime_ns)


class FileTensors:
    """The tensors of one opened file, findable by address. Holds them, so that no address is reused meanwhile."""

    def __init__(self, identity: FileIdentity, tensors: Mapping[str, torch.Tensor]) -> None:
        self.identity = identity
        self.tensors = dict(tensors)
        self._versions = {name: _version(tensor) for name, tensor in self.tensors.items()}

    def check(self) -> None:
        """Raises UntraceableError for quantised checkpoints and for dtypes that cannot be shared."""
        for name, tensor in self.tensors.items():
            if name.endswith(_QUANTISED):
                raise UntraceableError(
                    f"{self.identity.path} is a quantised checkpoint ({name}), which cannot be shared yet"
                )
            if tensor.dtype not in NAMES:
                raise UntraceableError(f"{self.identity.path}: {name} is {tensor.dtype}, which cannot be shared")

    def locate(self, tensor: torch.Tensor) -> tuple[str, int] | None:
        """``(name, first element)`` of the file tensor that ``tensor`` lies in, or None."""
        spans = self._spans
        index = bisect_right(spans, (tensor.data_ptr(), "\U0010ffff")) - 1
        if index < 0 or not tensor.nbytes:
            return None
        begin, name = spans[index]
        whole = self.tensors[name]
        start = tensor.data_ptr() - begin
        if start + tensor.nbytes > whole.nbytes or tensor.dtype != whole.dtype:
            return None
        return name, start // whole.element_size()

    def untouched(self, name: str) -> bool:
        """Whether nobody has written to this tensor since it was opened."""
        return _version(self.tensors[name]) == self._versions[name]

    @cached_property
    def _spans(self) -> list[tuple[int, str]]:
        return sorted((t.data_ptr(), name) for name, t in self.tensors.items() if t.nbytes and t.is_contiguous())


def _version(tensor: torch.Tensor) -> int:
    """-1 for inference tensors: a loader of somebody else's made them, and writes to them are not counted."""
    return -1 if tensor.is_inference() else tensor._version


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
    def tensor(self) -> torch.Tensor | None:
        """What is there now; None where the loader took the parameter away again."""
        table = self.owner._buffers if self.is_buffer else self.owner._parameters
        return table.get(self.name)


@dataclass
class Trace:
    """One stock loader call. Use as a context manager around it, in the thread that makes it."""

    home: torch.device = field(default_factory=lambda: torch.device("cpu"))
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

    def saw_file(self, file: FileTensors) -> None:
        """The loader works with this file. Raises UntraceableError."""
        file.check()
        self.files.append(file)

    def locate(self, tensor: torch.Tensor) -> Origin | None:
        """Where in the files seen so far ``tensor`` lies, or None. Only dense tensors count."""
        for file in self.files:
            found = file.locate(tensor) if tensor.is_contiguous() else None
            if found is not None:
                return Origin(file, *found)
        return None

    def before_load(self, module: torch.nn.Module) -> list[tuple[Slot, torch.Tensor]]:
        """``module`` is about to be loaded: every tensor in it, with the dtype it was built with."""
        return [
            (Slot(owner, name, tensor.dtype, is_buffer), tensor)
            for owner in module.modules()
            for table, is_buffer in ((owner._parameters, False), (owner._buffers, True))
            for name, tensor in table.items()
            if tensor is not None
        ]

    def after_load(self, candidates: list[tuple[Slot, torch.Tensor]]) -> None:
        """The load is done: what was replaced was loaded, under whatever name the state dict had it."""
        for candidate, before in candidates:
            now = candidate.tensor
            if now is None or now is before:
                continue
            # a second load of the same module finds the first one's dtype: what it was built with counts
            slot = self._slots.setdefault(candidate.key, candidate)
            slot.origin = self.locate(now)

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
    """A state dict that remembers its file, for VAE(), which is given a dict and no path. Copies are plain dicts."""

    original: FileTensors | None = None

    def __reduce__(self) -> tuple[type, tuple[dict[str, torch.Tensor]]]:
        return dict, (dict(self),)

    def __copy__(self) -> dict[str, torch.Tensor]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, torch.Tensor]:
        return copy.deepcopy(dict(self), memo)


def install_load_state_dict() -> None:
    """Make ``Module.load_state_dict`` tell the active trace; without one it is torch's own."""
    stock = torch.nn.Module.load_state_dict

    def load_state_dict(
        self: torch.nn.Module, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        trace = active()
        if trace is None:
            return stock(self, state_dict, strict=strict, assign=assign)
        candidates = trace.before_load(self)
        result = stock(self, state_dict, strict=strict, assign=True)
        trace.after_load(candidates)
        return result

    torch.nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]
