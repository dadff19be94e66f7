"""Tensors over mapped bytes: the only code that turns memory into tensors.

SAFETY: each tensor holds a reference to its mapping, and the mapping unmaps itself when the last reference goes. So a
view is valid for as long as it exists, whoever closed what. Each tensor has a storage of its own, exactly its size:
deepcopy and pickling copy one tensor, never a whole segment.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence

import torch
from typing_extensions import Buffer

from lunashm.cuda_views import tensor_at
from lunashm.errors import UnsupportedFormat
from lunashm.manifest import Manifest, TensorSpec
from lunashm.memory import Mapping
from lunashm.memory.device import DeviceMapping

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "I16": torch.int16, "U16": torch.uint16, "I32": torch.int32, "U32": torch.uint32,
    "I64": torch.int64, "U64": torch.uint64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
}  # fmt: skip
if hasattr(torch, "float8_e8m0fnu"):
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu

NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """Raises UnsupportedFormat for a dtype that this torch lacks."""
    try:
        return DTYPES[name]
    except KeyError:
        raise UnsupportedFormat(f"torch {torch.__version__} has no dtype for {name!r}; install a newer torch") from None


def dtype_name(dtype: torch.dtype) -> str:
    """Raises UnsupportedFormat for a dtype that no checkpoint can hold."""
    try:
        return NAMES[dtype]
    except KeyError:
        raise UnsupportedFormat(f"{dtype} is not a dtype lunashm can serve ({', '.join(NAMES.values())})") from None


_quiet_lock = threading.Lock()
_quiet = False


def state_dict(manifest: Manifest, mappings: Sequence[Mapping]) -> dict[str, torch.Tensor]:
    """``{name: read-only tensor}`` for every tensor of ``manifest``; ``mappings[i]`` is segment i.

    Writing to one of these tensors kills the process (SIGSEGV, on a GPU an illegal access that ends its CUDA context):
    that is the protection working. On ``cuda-ipc`` nothing protects them: a write reaches every client.
    Raises UnsupportedFormat for a dtype that this torch lacks.
    """
    _silence_read_only_warning()
    with torch.inference_mode(False):  # inference tensors could not become parameters outside inference mode
        return {spec.name: _view(spec, mappings[spec.segment]) for spec in manifest.tensors}


def _view(spec: TensorSpec, mapping: Mapping) -> torch.Tensor:
    dtype = torch_dtype(spec.dtype)
    if isinstance(mapping, DeviceMapping):
        return tensor_at(mapping, spec.offset, dtype, spec.shape)
    if spec.nbytes == 0:
        return torch.empty(spec.shape, dtype=dtype)
    count = spec.nbytes // dtype.itemsize
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=spec.offset).view(spec.shape)


def convert(data: Buffer, source: str, target: str) -> memoryview:
    """The bytes of ``data`` (dense ``source`` elements) as ``target`` elements: torch's own cast, copy_()'s too."""
    converted = torch.frombuffer(data, dtype=torch_dtype(source)).to(torch_dtype(target))
    return memoryview(converted.view(torch.uint8).numpy())  # type: ignore[arg-type] # numpy's stubs hide __buffer__


def _silence_read_only_warning() -> None:
    """torch warns once per process that a buffer is not writable. That is the point here: spend the warning unseen."""
    global _quiet
    with _quiet_lock:
        if not _quiet:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.frombuffer(bytes(8), dtype=torch.uint8)
            _quiet = True
