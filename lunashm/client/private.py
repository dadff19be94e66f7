"""A private copy of a file, for where sharing cannot be and the caller wants the weights all the same."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from lunashm.client.attachment import Attachment
from lunashm.cuda_views import torch_device
from lunashm.errors import InvalidCheckpoint, LunashmError, ModelNotReady
from lunashm.manifest import PRIVATE, DtypeRule, Manifest, RuleBook, Source, TensorSpec
from lunashm.memory import CPU
from lunashm.views import dtype_name, torch_dtype


def local_copy(path: str, rules: tuple[DtypeRule, ...], why: LunashmError, device: str = CPU) -> Attachment:
    """A private copy on ``device`` (``cpu`` or a GPU's UUID), because of ``why``. Damage is safetensors' to find here.

    Raises ``why`` where there is no such file to read either, InvalidCheckpoint for a damaged one.
    """
    if Path(path).suffix.lower() not in (".safetensors", ".sft"):
        raise why
    book, place = RuleBook(rules), torch_device(device)
    tensors: dict[str, torch.Tensor] = {}
    specs = []
    try:
        stat = os.stat(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 - not a dict
                stored = file.get_tensor(name)
                served = torch_dtype(book.resolve(name, dtype_name(stored.dtype)))
                tensor = tensors[name] = stored.to(place, served, copy=True)
                names = dtype_name(stored.dtype), dtype_name(served)
                specs.append(TensorSpec(name, *names, tuple(tensor.shape), PRIVATE, 0, tensor.nbytes))
    except OSError as exc:
        raise why from exc
    except SafetensorError as exc:
        raise InvalidCheckpoint(f"{path} cannot be loaded locally either: {exc}") from exc
    source = Source(os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)
    attachment = Attachment(Manifest(Path(path).name, "", 0, source, rules, tuple(specs), (), metadata), tensors)
    attachment.reason = "still loading in the host" if isinstance(why, ModelNotReady) else why.message
    return attachment
