"""How a program writes to memory that it may only read: by mistake, and by force. Knows no rung's name."""

from __future__ import annotations

import ctypes
from typing import Any

from lunashm.memory import CPU, Mapping


def scribble(mapping: Mapping, byte: int) -> None:
    """Over its first bytes. Raises OSError where a driver refuses; dies where the hardware does."""
    if mapping.handle.device == CPU:
        _on_cpu(mapping, byte)
    else:
        _on_gpu(mapping, byte)


def _on_cpu(mapping: Any, byte: int) -> None:
    import numpy as np

    ctypes.memset(np.frombuffer(mapping, np.uint8).ctypes.data, byte, 16)


def _on_gpu(mapping: Any, byte: int) -> None:
    from cuda.bindings import driver

    def check(answer: tuple[Any, ...]) -> Any:
        if answer[0] != driver.CUresult.CUDA_SUCCESS:
            raise OSError(f"the driver says {answer[0].name}")
        return answer[-1]

    check(driver.cuInit(0))
    check(driver.cuCtxSetCurrent(check(driver.cuDevicePrimaryCtxRetain(check(driver.cuDeviceGet(0))))))
    check(driver.cuMemcpyHtoD(mapping.__cuda_array_interface__["data"][0], bytes([byte]) * 16, 16))
    check(driver.cuCtxSynchronize())
