"""Which GPU is meant: names that people type, UUIDs that processes agree on. Pure; ``cuda.py`` asks the driver.

Ordinals are each process's own: ``CUDA_VISIBLE_DEVICES`` renumbers them. Only UUIDs cross a process boundary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lunashm.errors import SettingsError, WrongDevice

_ORDINAL = re.compile(r"cuda(?::([0-9]{1,4}))?")
_UUID = re.compile(r"(GPU|MIG)-[0-9a-f-]+", re.IGNORECASE)


@dataclass(frozen=True)
class Gpu:
    """One GPU, or one MIG instance, that this process sees.

    ``vmm``: it has virtual memory management; ``vmm_fd``: and its memory can be exported as a file descriptor.
    """

    ordinal: int
    uuid: str
    name: str
    mig: bool
    compute_mode: str
    vmm: bool
    vmm_fd: bool

    def __str__(self) -> str:
        return f"cuda:{self.ordinal} {self.name}"


def may_name(device: str) -> bool:
    """Whether a GPU could be called so."""
    return bool(_ORDINAL.fullmatch(device) or _UUID.fullmatch(device))


def pick(device: str, gpus: Sequence[Gpu]) -> Gpu:
    """What ``cuda``, ``cuda:N`` or the start of a UUID names. Raises SettingsError."""
    ordinal = _ORDINAL.fullmatch(device)
    if ordinal is not None:
        wanted = int(ordinal[1] or 0)
        found = [gpu for gpu in gpus if gpu.ordinal == wanted]
    elif _UUID.fullmatch(device):
        found = [gpu for gpu in gpus if gpu.uuid.lower().startswith(device.lower())]
    else:
        raise SettingsError(f"there is no device {device!r}; use cpu, cuda, cuda:N or a UUID: {listing(gpus)}")
    if len(found) != 1:
        problem = "no GPU is" if not found else f"{len(found)} GPUs are"
        raise SettingsError(f"{problem} called {device!r} in this process; it sees {listing(gpus)}")
    return found[0]


def find(uuid: str, gpus: Sequence[Gpu]) -> Gpu:
    """The GPU of a whole UUID. Raises WrongDevice."""
    for gpu in gpus:
        if gpu.uuid == uuid:
            return gpu
    sees = f"only {listing(gpus)}" if gpus else "no GPU"
    raise WrongDevice(
        f"the host's memory is on {uuid}; this process sees {sees}; start it with CUDA_VISIBLE_DEVICES={uuid}"
    )


def listing(gpus: Sequence[Gpu]) -> str:
    return ", ".join(f"cuda:{gpu.ordinal}, {gpu.name} ({gpu.uuid})" for gpu in gpus) or "no GPU"


__all__ = ["Gpu", "find", "listing", "may_name", "pick"]
