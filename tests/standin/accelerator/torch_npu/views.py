"""Tensors over memory that is somebody else's, as a lunashm host's: where a GPU has torch's CUDA, here is ``npu``."""

from __future__ import annotations

from math import prod

import torch

from torch_npu import npu


def tensor_at(pointer: int, dtype: torch.dtype, shape: tuple[int, ...], owner: object, device: int = 0) -> torch.Tensor:
    """A tensor on ``npu:device``, with a storage of its own; it keeps ``owner`` as long as anything uses that."""
    if not 0 <= device < npu.device_count():
        raise RuntimeError(f"there is no device npu:{device}: this process sees {npu.device_count()}")
    nbytes = prod(shape) * dtype.itemsize
    if not nbytes:
        return torch.empty(shape, dtype=dtype, device=f"npu:{device}")
    made = torch.ops.lunashm_standin.tensor_at(pointer, nbytes, device, id(owner))
    return made.view(dtype).view(shape)


def install_views() -> None:
    """lunashm's views of a GPU's memory are npu tensors from now on; all else of it stays what it is."""
    import lunashm.client.private
    import lunashm.cuda_views
    import lunashm.views

    for module in (lunashm.cuda_views, lunashm.views):
        module.tensor_at = _tensor_at
    for module in (lunashm.cuda_views, lunashm.client.private):
        module.torch_device = _torch_device
    lunashm.cuda_views.device_uuid = _device_uuid


def _torch_device(device: str) -> torch.device:
    from lunashm.memory import CPU
    from lunashm.memory.cuda_device import device_of

    return torch.device(CPU) if device == CPU else torch.device("npu", device_of(device).gpu.ordinal)


def _device_uuid(device: torch.device) -> str:
    from lunashm.memory import CPU, cuda

    return CPU if device.type == CPU else cuda.resolve(f"cuda:{device.index}")


def _tensor_at(mapping, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    piece = mapping.at(offset, prod(shape) * dtype.itemsize)
    return tensor_at(piece.pointer, dtype, shape, piece, _torch_device(mapping.handle.device).index)
