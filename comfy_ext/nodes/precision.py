"""In which dtype a diffusion model's weights are wanted. Whatever it is, the host converts once for all who ask."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import torch

AUTO = "auto"
AS_STORED = "as stored"
_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
CHOICES = [AUTO, AS_STORED, *_DTYPES]

_STORED = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_DIFFUSION_MODEL = "model.diffusion_model."
_LONGEST_HEADER = 100_000_000


def model_options(precision: str, path: str) -> dict[str, Any]:
    """For the stock loaders: as UNETLoader does it. Empty where ComfyUI is to choose.

    ``as stored`` is the dtype that most of the diffusion model's bytes have in the file; a file that does not say (a
    pickle) leaves it to ComfyUI.
    """
    dtype = stored_dtype(path) if precision == AS_STORED else _DTYPES.get(precision)
    return {} if dtype is None else {"dtype": dtype}


def stored_dtype(path: str) -> torch.dtype | None:
    """Of a safetensors file, from its header alone; None for others, and for a quantised checkpoint."""
    header = _header(path)
    whole = any(name.startswith(_DIFFUSION_MODEL) for name in header)
    nbytes: Counter[str] = Counter()
    for name, entry in header.items():
        if name != "__metadata__" and (not whole or name.startswith(_DIFFUSION_MODEL)):
            begin, end = entry["data_offsets"]
            nbytes[entry["dtype"]] += end - begin
    return _STORED.get(nbytes.most_common(1)[0][0]) if nbytes else None


def _header(path: str) -> dict[str, Any]:
    """Empty where the file is no safetensors file: its loader will say so."""
    if not path.lower().endswith((".safetensors", ".sft")):
        return {}
    try:
        with Path(path).open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= _LONGEST_HEADER else {}
    except (OSError, struct.error, ValueError):
        return {}
    return header if isinstance(header, dict) else {}
