"""``torch.npu``: what programs ask a device module for, as torch.cuda answers it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from torch_npu import _library

OutOfMemoryError = torch.OutOfMemoryError
Device = int | str | torch.device | None


def _index(device: Device) -> int:
    if device is None:
        return current_device()
    if isinstance(device, int):
        return device if device >= 0 else current_device()
    index = torch.device(device).index
    return current_device() if index is None else index


def is_available() -> bool:
    return device_count() > 0


def is_initialized() -> bool:
    return True


def init() -> None:
    pass


_lazy_init = init


def device_count() -> int:
    return int(_library.count())


def current_device() -> int:
    return int(_library.current())


def set_device(device: Device) -> None:
    _library.set_current(_index(device))


class device:  # as torch.cuda.device
    """``with torch.npu.device(1): ...``"""

    def __init__(self, device: Device) -> None:
        self._index = _index(device)

    def __enter__(self) -> None:
        self._before = current_device()
        set_device(self._index)

    def __exit__(self, *exc_info: object) -> None:
        set_device(self._before)


def get_device_name(device: Device = None) -> str:
    return f"Stand-in accelerator {_index(device)}"


def get_device_properties(device: Device = None) -> SimpleNamespace:
    _, total = mem_get_info(device)
    return SimpleNamespace(name=get_device_name(device), total_memory=total, major=9, minor=0)


def synchronize(device: Device = None) -> None:
    pass


# -- memory ------------------------------------------------------------------------------------------------------------


def mem_get_info(device: Device = None) -> tuple[int, int]:
    """Free bytes of the whole device, other processes' use included, and all bytes."""
    return _library.memory(_index(device))


def memory_stats(device: Device = None) -> dict[str, int]:
    stats = _library.stats(_index(device))
    named = {
        "allocation.all.current": stats["live"],
        "allocation.all.allocated": stats["allocations"],
        "num_ooms": stats["ooms"],
    }
    for kind, source in (("allocated", "allocated"), ("active", "allocated"), ("reserved", "reserved")):
        named[f"{kind}_bytes.all.current"] = stats[source]
        named[f"{kind}_bytes.all.peak"] = stats[f"{source}_peak"]
    return named


def facts(device: Device = None) -> dict[str, int]:
    """What the stand-in counts beyond that: copies to and from the device, the largest allocation."""
    return _library.stats(_index(device))


def reset_peak_memory_stats(device: Device = None) -> None:
    _library.reset(_index(device))


def memory_allocated(device: Device = None) -> int:
    return facts(device)["allocated"]


def max_memory_allocated(device: Device = None) -> int:
    return facts(device)["allocated_peak"]


def memory_reserved(device: Device = None) -> int:
    return facts(device)["reserved"]


def owns(tensor: torch.Tensor) -> bool:
    """Whether its memory is torch's; else it is a view of somebody's."""
    return not tensor.nbytes or bool(_library.owns(tensor.device.index, tensor.data_ptr()))


def empty_cache() -> None:
    _library.empty_cache()


# -- random numbers: the CPU draws them, so its own seed is the devices', too ------------------------------------------


def manual_seed(seed: int) -> None:
    pass


manual_seed_all = manual_seed


def get_rng_state(device: Device = None) -> torch.Tensor:
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: Device = None) -> None:
    torch.set_rng_state(state)


def _is_in_bad_fork() -> bool:
    return False


def get_amp_supported_dtype() -> list[Any]:
    return [torch.float16, torch.bfloat16]
