"""Tensors over mapped device memory: the one place where torch meets an address that its allocator did not make.

What only a GPU can show, and ``tests/gpu`` does: that torch takes the pointer as it is (no copy, right device), that
kernels read it under either of torch's allocators, and that the memory stays mapped while a tensor lives.
"""

from __future__ import annotations

from math import prod

import torch

from lunashm.errors import SettingsError, SharedMemoryError
from lunashm.memory import CPU, cuda
from lunashm.memory.cuda_device import device_of
from lunashm.memory.device import DeviceMapping


def torch_device(device: str) -> torch.device:
    """What torch calls ``cpu`` or a UUID: it numbers GPUs as the driver does. Raises WrongDevice, SettingsError."""
    return torch.device(CPU) if device == CPU else torch.device("cuda", device_of(device).gpu.ordinal)


def device_uuid(device: torch.device) -> str:
    """What hosts call the device that torch calls ``device``: ``cpu``, or a GPU's UUID.

    Raises SettingsError for one that no host can be for: not NVIDIA's, or without cuda-bindings to ask its driver.
    """
    if device.type == CPU:
        return CPU
    if device.type != "cuda" or torch.version.hip is not None:
        raise SettingsError(f"{device} is no NVIDIA GPU; only those have memory that lunashm can share")
    return cuda.resolve(f"cuda:{torch.cuda.current_device() if device.index is None else device.index}")


def tensor_at(mapping: DeviceMapping, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor with a storage of its own, exactly its size, over ``mapping`` from ``offset`` bytes on.

    Raises SharedMemoryError where this torch cannot use the GPU, or would copy.
    """
    device = torch_device(mapping.handle.device)
    piece = mapping.at(offset, prod(shape) * dtype.itemsize)
    try:
        with torch.cuda.device(device):  # older torch asks CUDA about the pointer before it chooses a device
            if not piece.nbytes:
                return torch.empty(shape, dtype=dtype, device=device)
            tensor = torch.as_tensor(piece, device=device)  # |u1; torch keeps ``piece``, and that keeps the mapping
    except (RuntimeError, AssertionError) as exc:  # torch's words for a build without CUDA, a driver it cannot use
        raise SharedMemoryError(
            f"torch {torch.__version__} cannot use the host's memory on {mapping.handle.device}: {exc}"
        ) from exc
    if tensor.data_ptr() != piece.pointer:
        raise SharedMemoryError(
            f"torch {torch.__version__} made a copy on {device} instead of a view of the memory at {piece.pointer:#x}; "
            "is this process's current CUDA device another one than the host's?"
        )
    return tensor.view(dtype).view(shape)
