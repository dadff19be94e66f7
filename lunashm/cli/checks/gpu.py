"""NVIDIA's driver and the GPUs that it shows: what each is, and whether its memory can be shared. Run it apart.

A machine without a GPU is a healthy machine. Whether memory can be shared is tried; what is known of a GPU beforehand
only explains why it cannot.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from lunashm.cli.checks import mps
from lunashm.cli.checks.check import Check, State, Task, Wanted
from lunashm.cli.checks.memory import rungs
from lunashm.cli.output import count
from lunashm.errors import LunashmError, SettingsError
from lunashm.memory import cuda, gpus
from lunashm.memory.gpus import Gpu

NAME = "GPU driver"
_START_S = 60.0
"""The driver starts GPUs that sleep, eight of them one after the other."""

_HELP = {
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "the driver was updated under its kernel module: reboot",
    "CUDA_ERROR_SYSTEM_NOT_READY": "sudo systemctl start nvidia-fabricmanager",
    "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE": "take cuda-compat out of LD_LIBRARY_PATH, or update the driver",
    "CUDA_ERROR_MPS": "restart the MPS daemon: echo quit | nvidia-cuda-mps-control; nvidia-cuda-mps-control -d",
    "CUDA_ERROR_NOT_PERMITTED": "ls -l /dev/nvidia*: add the user to the group that owns them",
    "CUDA_ERROR_INVALID_DEVICE": "nvidia-smi: is CUDA_VISIBLE_DEVICES right?",
    "CUDA_ERROR_UNKNOWN": "sudo nvidia-modprobe -u -c=0",
}
"""What cuInit says where the driver is there and cannot be used, by the beginning of its words."""


class Look:
    """What one look at the driver found; ``gpus`` only where all is well."""

    def __init__(self, wanted: Wanted, root: Path = Path("/")) -> None:
        self.wanted = wanted
        self.gpus: list[Gpu] = []
        self._root = root
        self._broken = State.FAIL if wanted.on_gpu else State.WARN

    def driver(self) -> Check:
        release, there = kernel_module(self._root), in_kernel(self._root)
        if not cuda.installed():
            return self._without_library(release) if there else self._without_driver()
        if not cuda.bindings():
            if not there:
                return self._without_driver()
            text = f"{release or 'installed'}, but there are no cuda-bindings to call it with"
            return Check(NAME, self._broken, text, "python -m pip install 'lunashm[cuda]'")
        try:
            newest = cuda.newest()
            self.gpus = cuda.devices()
        except SettingsError as exc:
            return self._without_gpus(release, exc) if there else self._without_driver()
        except LunashmError as exc:
            known = next((fix for name, fix in _HELP.items() if name in exc.message), "nvidia-smi; dmesg | grep NVRM")
            fix = permission(self._root) or known
            return Check(NAME, self._broken, f"{release or 'installed'}, but {exc.message}", fix)
        found = f"{release or 'unknown release'}, CUDA up to {newest[0]}.{newest[1]}, cuda-bindings {cuda.bindings()}"
        return Check(NAME, State.OK, f"{found}, sees {count(len(self.gpus), 'GPU')}")

    def _without_library(self, release: str) -> Check:
        text = f"in the kernel ({release or 'unknown release'}), but no libcuda.so.1 in this system or container"
        fix = "docker run --gpus all -e NVIDIA_DRIVER_CAPABILITIES=compute,utility; else install the whole driver"
        return Check(NAME, self._broken, text, fix)

    def _without_driver(self) -> Check:
        """Also where only the library is there, as in many a container's image."""
        text = "no NVIDIA driver: CPU memory only"
        if self.wanted.on_gpu:
            fix = f"install it, or use the CPU instead of {self.wanted.device}: lunashm serve --device cpu"
            return Check(NAME, State.FAIL, text, fix)
        return Check(NAME, State.OK, text)

    def _without_gpus(self, release: str, error: SettingsError) -> Check:
        text = f"{release or 'installed'}, but {error.message}"
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden in ("", "-1") and not self.wanted.on_gpu:
            text = f"{release or 'installed'}; CUDA_VISIBLE_DEVICES hides all GPUs: CPU memory only"
            return Check(NAME, State.OK, text)
        fix = "unset CUDA_VISIBLE_DEVICES" if hidden is not None else permission(self._root) or "nvidia-smi"
        return Check(NAME, self._broken, text, fix)

    def configured(self) -> Gpu | None:
        """The GPU that is to be used; None for another device, or one that is not there."""
        try:
            return gpus.pick(self.wanted.device, self.gpus) if self.wanted.on_gpu else None
        except SettingsError:
            return None


def tasks(wanted: Wanted) -> Iterator[Task]:
    if wanted.only and not wanted.on_gpu:
        yield Task(NAME, lambda: Check(NAME, State.SKIP, "only the CPU is looked at"))
        return
    look = Look(wanted)
    yield Task(NAME, look.driver, _START_S)
    if not look.gpus:
        return
    configured = look.configured()
    if wanted.on_gpu and configured is None:
        yield Task("device", partial(missing, wanted, look.gpus))
    yield Task("MPS", mps.look)
    for gpu in [configured] if wanted.only else look.gpus:
        if gpu is not None:
            yield Task(place(gpu), partial(describe, gpu, gpu == configured, mps.running()))
            yield from rungs(wanted.memory, gpu.uuid, place(gpu), configured=gpu == configured)


def place(gpu: Gpu) -> str:
    return f"cuda:{gpu.ordinal}"


def missing(wanted: Wanted, seen: list[Gpu]) -> Check:
    """That the configured GPU is not one of ``seen``."""
    try:
        gpus.pick(wanted.device, seen)
    except SettingsError as exc:
        return Check("device", State.FAIL, exc.message, "lunashm doctor --device cuda:0")
    return Check("device", State.OK, wanted.device)


def describe(gpu: Gpu, chosen: bool, with_mps: bool) -> Check:
    """What is known about the GPU; the round trips of its rungs have the last word on sharing.

    ``chosen``: it is the one that lunashm is to use. ``with_mps``: to the driver all processes are one.
    """
    bad = State.FAIL if chosen else State.WARN
    mode = f"compute mode {gpu.compute_mode}"
    vmm = "VMM with file descriptors" if gpu.vmm_fd else "VMM without file descriptors" if gpu.vmm else "no VMM"
    mig = ["a MIG instance: CUDA IPC does not work between instances"] if gpu.mig else []
    text = ", ".join([gpu.name, gpu.uuid, mode, vmm, *mig])
    default = f"sudo nvidia-smi{'' if gpu.mig else f' -i {gpu.uuid}'} -c DEFAULT"  # of the GPU, not of a part of it
    if gpu.compute_mode == "prohibited":
        return Check(place(gpu), bad, f"{text}: no process may use it", default)
    if gpu.compute_mode == "exclusive-process" and not with_mps:
        return Check(place(gpu), bad, f"{text}: one process at a time", default)
    if not (gpu.vmm and gpu.vmm_fd):
        text += ": cuda-vmm does not work, cuda-ipc has to"
        return Check(place(gpu), State.WARN, text)
    return Check(place(gpu), State.OK, text)


# -- files of the driver -----------------------------------------------------------------------------------------------


def kernel_module(root: Path = Path("/")) -> str:
    """The release of the driver's kernel module, such as 570.86.15; empty where it does not say (WSL2) or is absent."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)*\b", text)
    return found[0] if found else "of an unknown release"


def in_kernel(root: Path = Path("/")) -> bool:
    """Whether there is anything that a library could talk to; on WSL2 that is Windows' own driver."""
    return any((root / place).exists() for place in ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/dxg"))


def permission(root: Path = Path("/")) -> str:
    """What opens the driver's device files to this user; empty where they are open."""
    files = [*(root / "dev").glob("nvidia*[0-9]"), root / "dev/nvidiactl", root / "dev/nvidia-uvm"]
    closed = [file for file in files if file.exists() and not os.access(file, os.R_OK | os.W_OK)]
    return f"sudo usermod -aG $(stat -c %G {closed[0]}) $USER, and log in again" if closed else ""
