"""NVIDIA's management library, and the only file that imports pynvml. Knows GPUs by UUID and processes by pid.

Nothing is imported before the first question, and every error ends here, as an ``Unseen`` with its words. Whatever
fails is tried anew at the next question: a driver may come, or come back.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from lunashm.usage import Unseen


@dataclass(frozen=True)
class GpuMemory:
    """Bytes. ``used``: by everybody on the device, what the driver keeps for itself included.

    ``processes``: by pid, None where NVML has no figure. Whether memory that a process imported from another is
    counted for both differs, so these are never added up. In a container NVML may name other pids than ours.
    """

    used: int
    total: int
    processes: dict[int, int | None] | Unseen


class Nvml:
    """One user of the library in this process."""

    def __init__(self) -> None:
        self._initialised = False

    def uuids(self) -> tuple[str, ...] | Unseen:
        """Of all GPUs of the machine; ``CUDA_VISIBLE_DEVICES`` hides none here. MIG instances are not listed."""
        found = self._ask(_uuids)
        return found if isinstance(found, Unseen) else tuple(found)

    def memory(self, uuid: str) -> GpuMemory | Unseen:
        """Of the GPU, or MIG instance, of that name."""
        found = self._ask(_memory, uuid)
        if isinstance(found, Unseen):
            return found
        used, total, device = found
        processes = self._ask(_processes, device)
        return GpuMemory(used, total, processes)

    def close(self) -> None:
        if self._initialised:
            self._initialised = False
            pynvml = _library()
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def _ask(self, question: Any, *arguments: object) -> Any:  # noqa: ANN401 - pynvml has no types
        """What ``question`` finds, or why not: the one place that maps NVML's errors."""
        try:
            pynvml = _library()
        except ImportError as exc:
            return Unseen(f"NVML cannot be asked: {exc}; install it: pip install nvidia-ml-py")
        try:
            if not self._initialised:
                pynvml.nvmlInit()
                self._initialised = True
            return question(pynvml, *arguments)
        except pynvml.NVMLError_LibraryNotFound:
            return Unseen("NVML (libnvidia-ml.so.1) is not installed; it comes with NVIDIA's driver")
        except (pynvml.NVMLError_Uninitialized, pynvml.NVMLError_GpuIsLost) as exc:
            self.close()  # the driver was reset or replaced: start over
            return Unseen(f"NVML: {exc}")
        except pynvml.NVMLError as exc:
            return Unseen(f"NVML: {exc}")


def _library() -> Any:  # noqa: ANN401
    import pynvml  # noqa: PLC0415 - not before a GPU is asked about

    return pynvml


def _uuids(pynvml: Any) -> list[str]:  # noqa: ANN401
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]


def _memory(pynvml: Any, uuid: str) -> tuple[int, int, Any]:  # noqa: ANN401
    device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
    memory = pynvml.nvmlDeviceGetMemoryInfo(device)
    return int(memory.used), int(memory.total), device


def _processes(pynvml: Any, device: Any) -> dict[int, int | None]:  # noqa: ANN401
    try:
        found = pynvml.nvmlDeviceGetComputeRunningProcesses_v3(device)
    except pynvml.NVMLError_FunctionNotFound:  # drivers before 510
        found = pynvml.nvmlDeviceGetComputeRunningProcesses_v2(device)
    return {int(one.pid): one.usedGpuMemory for one in found}


__all__ = ["GpuMemory", "Nvml"]
