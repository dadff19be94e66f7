"""The interpreter, and torch in it: which build, for which CUDA, with which allocator. Imports torch: run it apart."""

from __future__ import annotations

import importlib
import os
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping

from lunashm.cli.checks.check import Check, State, Task, Wanted
from lunashm.errors import LunashmError
from lunashm.memory import cuda

_PYTHON = (3, 11)
_TORCH = (2, 6)
_IMPORT_S = 180.0
"""Torch's CUDA build is gigabytes of libraries; from a cold disk that takes minutes."""
_ALLOCATORS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The second one is the older name; torch prefers the first."""


def tasks(wanted: Wanted) -> Iterator[Task]:
    yield Task("python", python)
    yield Task("torch", torch, _IMPORT_S)
    yield Task("torch build", lambda: build(wanted), _IMPORT_S)
    yield Task("allocator", allocator)


def python() -> Check:
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < _PYTHON:
        return Check("python", State.FAIL, text, "lunashm needs Python 3.11 or newer")
    return Check("python", State.OK, text)


def torch() -> Check:
    started = time.monotonic()
    try:
        version = str(importlib.import_module("torch").__version__)
    except (ImportError, OSError) as exc:
        return Check("torch", State.FAIL, f"cannot be imported: {exc}", f"{sys.executable} -m pip install torch")
    text = f"{version}, imported in {time.monotonic() - started:.1f} s"
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < _TORCH:
        return Check("torch", State.FAIL, text, f"{sys.executable} -m pip install 'torch>=2.6'")
    return Check("torch", State.OK, text)


def build(wanted: Wanted) -> Check:
    """What torch was built for, against what the driver can run. A host needs no CUDA in its torch; clients do."""
    try:
        version = importlib.import_module("torch").version
    except (ImportError, OSError):
        return Check("torch build", State.SKIP, "torch cannot be imported")
    return compare(wanted, str(version.cuda or ""), str(getattr(version, "hip", None) or ""), _newest())


def compare(wanted: Wanted, built: str, hip: str, newest: tuple[int, int] | None) -> Check:
    """``built``: the CUDA version of torch, empty for a build without. ``newest``: the driver's, None for no driver."""
    name = "torch build"
    fix = "choose a build for your driver at https://pytorch.org/get-started/locally"
    if newest is None:
        text = f"for CUDA {built}; it runs without a driver" if built else f"for {f'ROCm {hip}' if hip else 'CPU'}"
        return Check(name, State.OK, f"{text}, and there is none: CPU memory only")
    driver = f"the driver runs CUDA up to {newest[0]}.{newest[1]}"
    if not built:
        text = f"for {f'ROCm {hip}' if hip else 'CPU'}: programs in this Python cannot use a GPU's memory ({driver})"
        return Check(name, State.WARN, text, fix)
    if int(built.partition(".")[0]) > newest[0]:
        text = f"for CUDA {built}, but {driver}: torch cannot use the GPU"
        return Check(name, wanted.broken(on_gpu=True), text, f"update the driver, or {fix}")
    return Check(name, State.OK, f"for CUDA {built}; {driver}")


def _newest() -> tuple[int, int] | None:
    """None also where the driver cannot be asked: the checks of the driver say why."""
    try:
        return cuda.newest() if cuda.installed() else None
    except LunashmError:
        return None


def allocator(environ: Mapping[str, str] = os.environ) -> Check:
    """For information: a host's memory is the driver's own, and clients hand the driver's addresses to torch."""
    chosen = [f"{name}={environ[name]}" for name in _ALLOCATORS if environ.get(name)]
    text = ", ".join(chosen) or "torch's own choice"
    why = "does not matter to sharing: the host's memory comes from the driver, not from torch's allocator"
    return Check("allocator", State.OK, f"{text}; {why}")
