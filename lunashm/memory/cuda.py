"""NVIDIA's driver, and the only file that imports cuda-bindings. Knows calls and contexts, no segments.

Nothing is imported or initialised before somebody asks for a GPU. Every result of the driver is looked at here, and
becomes an error of ours here. A process that has asked can no longer fork children that use CUDA: they get
ForkedProcess, as they would from any CUDA program.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
from collections.abc import Collection
from typing import Any

from lunashm.errors import (
    ForkedProcess,
    LunashmError,
    OutOfSharedMemory,
    SegmentGone,
    SettingsError,
    SharedMemoryError,
)
from lunashm.memory import CPU, gpus
from lunashm.memory.gpus import Gpu

_owner = 0
"""The process that initialised CUDA here."""


# -- which GPUs --------------------------------------------------------------------------------------------------------


def devices() -> list[Gpu]:
    """All GPUs that this process sees, cuda:0 first. Raises SettingsError where there are none, or no driver."""
    found = _visible()
    if not found:
        chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = "is there one in nvidia-smi?" if chosen is None else f"CUDA_VISIBLE_DEVICES is {chosen!r}"
        raise SettingsError(f"this process sees no NVIDIA GPU ({why}); use cpu")
    return found


def resolve(device: str) -> str:
    """``cpu``, or the UUID of what ``cuda``, ``cuda:N`` or the start of a UUID names; ``auto`` is ``cpu`` here.

    Raises SettingsError.
    """
    named = device.lower() if device.lower().startswith((CPU, "cuda")) else device
    if named in (CPU, "auto"):
        return CPU
    try:
        found = devices()
    except SettingsError as exc:
        if not gpus.may_name(named):
            raise SettingsError(f"there is no device {device!r}; use cpu, cuda, cuda:N or a UUID (GPU-...)") from None
        raise SettingsError(f"device {device!r} cannot be used: {exc.message}") from None
    try:
        return gpus.pick(named, found).uuid
    except SettingsError as exc:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            raise
        raise SettingsError(f"{exc.message} (CUDA_VISIBLE_DEVICES is {visible!r})") from None


def describe(uuid: str) -> str:
    """What people call a device: ``cuda:0, NVIDIA H100 80GB HBM3``. Raises WrongDevice, SettingsError."""
    if uuid == CPU:
        return CPU
    gpu = find(uuid)
    return f"cuda:{gpu.ordinal}, {gpu.name}"


def find(uuid: str) -> Gpu:
    """The GPU of a whole UUID. Raises WrongDevice where this process does not see it, SettingsError."""
    return gpus.find(uuid, _visible())


def _visible() -> list[Gpu]:
    return [_look(ordinal) for ordinal in range(call("cuDeviceGetCount"))] if _initialise() else []


def _look(ordinal: int) -> Gpu:
    place = f"cuda:{ordinal}"

    def attribute(name: str) -> int:
        which = constant("CUdevice_attribute", f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(call("cuDeviceGetAttribute", which, ordinal, place=place))

    name = call("cuDeviceGetName", 256, ordinal, place=place).split(b"\0")[0].decode(errors="replace")
    # cuda-bindings 12 have both, and only the second one knows MIG instances; 13 have that one under the first name
    get_uuid = "cuDeviceGetUuid_v2" if hasattr(_driver(), "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
    raw = bytes(call(get_uuid, ordinal, place=place).bytes).hex()
    mig = " MIG " in name  # the driver API has no attribute for it
    mode = attribute("COMPUTE_MODE")
    return Gpu(
        ordinal=ordinal,
        uuid=f"{'MIG' if mig else 'GPU'}-{raw[:8]}-{raw[8:12]}-{raw[12:16]}-{raw[16:20]}-{raw[20:]}",
        name=name,
        mig=mig,
        compute_mode={0: "default", 2: "prohibited", 3: "exclusive-process"}.get(mode, str(mode)),
        vmm=bool(attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED")),
        vmm_fd=bool(attribute("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED")),
    )


def installed() -> bool:
    """Whether the driver's library can be loaded. Says nothing of GPUs, nor of whether it can be called."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def bindings() -> str:
    """The version of cuda-bindings; empty where they cannot be imported."""
    try:
        return str(importlib.import_module("cuda.bindings").__version__)
    except (ImportError, AttributeError):
        return ""


def newest() -> tuple[int, int]:
    """The newest version of CUDA that the driver can run. Needs no GPU. Raises SettingsError, SharedMemoryError."""
    version = int(call("cuDriverGetVersion"))
    return version // 1000, version % 1000 // 10


# -- calls -------------------------------------------------------------------------------------------------------------


def call(name: str, *arguments: object, place: str = "", gone: Collection[str] = ()) -> Any:
    """The value of one call of the driver; a tuple where it returns several, or none.

    ``place``: the GPU, for people. ``gone``: errors that mean that the memory asked for no longer exists. Raises
    OutOfSharedMemory, SegmentGone, ForkedProcess, SettingsError, SharedMemoryError.
    """
    error, values = _call(name, *arguments)
    if error is not None:
        raise _mapped(name, error, f" on {place}" if place else "", gone)
    return values[0] if len(values) == 1 else values


def constant(enum: str, name: str) -> Any:
    return getattr(getattr(_driver(), enum), name)


def struct(name: str) -> Any:
    """A structure of the driver's, all zero."""
    return getattr(_driver(), name)()


def _call(name: str, *arguments: object) -> tuple[str | None, tuple[Any, ...]]:
    """The error's name, and what was returned."""
    driver = _driver()
    try:
        result, *values = getattr(driver, name)(*arguments)
    except (RuntimeError, AttributeError) as exc:  # the bindings' words for a library or a function that is not there
        if type(exc).__name__ == "DynamicLibNotFoundError":
            raise SettingsError(
                "there is no NVIDIA driver on this machine (libcuda.so.1 is not found); install it, or use cpu"
            ) from None
        words = str(exc).strip().rstrip(".").partition("\n")[0]
        raise SettingsError(
            f"NVIDIA's driver (libcuda.so.1) cannot be called ({name}: {words}); install a newer one, or use cpu"
        ) from None
    except (ValueError, KeyError) as exc:  # the bindings do not know the code
        return f"an error newer than cuda-bindings ({exc})", ()
    return (result.name if result.value else None), tuple(values)


def _mapped(name: str, error: str, where: str, gone: Collection[str]) -> LunashmError:
    """Ours for the driver's error, at this edge only."""
    what = f"{name}{where} failed: {error}"
    if error == "CUDA_ERROR_NOT_INITIALIZED":
        return ForkedProcess(f"{what}: this process was forked from one that uses CUDA; start it anew (spawn)")
    if error in gone:
        return SegmentGone(f"{what}: the memory is gone (host stopped, or model unloaded); attach again")
    if error == "CUDA_ERROR_OUT_OF_MEMORY":
        return OutOfSharedMemory(f"{what}; unload a model (lunashm unload), or close what else uses the GPU")
    return SharedMemoryError(what)


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver  # noqa: PLC0415 - not before a GPU is wanted
    except ImportError as exc:
        advice = "install it: python -m pip install cuda-bindings"
        raise SettingsError(f"GPUs need cuda-bindings ({exc}); {advice}") from None
    return driver


def _initialise() -> bool:
    """Whether there is a GPU to be seen. Raises ForkedProcess, SettingsError."""
    global _owner
    if _owner == os.getpid():
        return True
    if _owner:
        raise ForkedProcess("this process was forked from one that uses CUDA; start it anew (spawn)")
    error, _ = _call("cuInit", 0)
    if error == "CUDA_ERROR_NO_DEVICE":
        return False
    if error is not None:
        raise _mapped("cuInit", error, "", ())
    _owner = os.getpid()
    return True


__all__ = [
    "Gpu", "bindings", "call", "constant", "describe", "devices", "find", "installed", "newest", "resolve", "struct"
]  # fmt: skip
