"""Which tiers of tests this machine can run: core always, comfy and comfy_gpu with a ComfyUI checkout, gpu with a GPU.

comfy_gpu is ComfyUI on a stand-in for a GPU, which needs none.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

TIERS = ("core", "comfy", "comfy_gpu", "gpu")
_ON_COMFY = ("comfy", "comfy_gpu")


def _comfy_folder() -> Path:
    return Path(os.environ.get("LUNASHM_COMFYUI") or Path.home() / "ComfyUI").expanduser()


def comfy_checkout() -> Path | None:
    """The ComfyUI checkout to test with: ``LUNASHM_COMFYUI``, else ``~/ComfyUI``; None where there is none."""
    folder = _comfy_folder()
    return folder if (folder / "main.py").is_file() else None


def comfy_version(checkout: Path) -> str:
    try:
        text = (checkout / "comfyui_version.py").read_text()
    except OSError:
        return "of unknown version"
    found = re.search(r"__version__\s*=\s*[\"']([^\"']+)", text)
    return found[1] if found else "of unknown version"


def cuda_device() -> str | None:
    """The name of the first CUDA device; None where there is none."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def why_not(tier: str) -> str | None:
    """Why this machine cannot run a tier; None where it can."""
    if tier in _ON_COMFY and comfy_checkout() is None:
        return f"no checkout at {_comfy_folder()} (LUNASHM_COMFYUI names another)"
    if tier == "gpu" and cuda_device() is None:
        return "no CUDA device"
    return None


def against(tier: str) -> str:
    """What a tier that ran was run against."""
    checkout = comfy_checkout()
    if tier in _ON_COMFY and checkout is not None:
        return f" against {checkout} {comfy_version(checkout)}"
    if tier == "gpu":
        return f" on {cuda_device()}"
    return ""
