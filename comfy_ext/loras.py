"""LoRA files in ComfyUI: read once, checked, and what does not fit said in one line.

The stock nodes, and packs that load LoRAs as these do, get here through ``comfy.utils.load_torch_file`` and
``comfy.sd.load_lora_for_models``. What is checked is only what goes onto a shared model; others are stock's.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.sd
import torch

from lunashm.client.factors import FactorCache
from lunashm.client.lora_file import listed, not_finite

from .patcher import SharedModelPatcher
from .shapes import grown_shape, misfit, region_shape
from .trace import FileIdentity, TaggedStateDict

log = logging.getLogger("lunashm.comfy")

CACHE_NBYTES = 2 << 30
"""Of LoRA files kept for the next time; they are mapped files, whose pages the kernel may drop."""

_TEXT_ENCODER = ("lora_te", "text_encoder")  # keys that nobody misses where a LoRA goes onto the model only

_NODES = {"LoraLoader": "load_lora", "CreateHookLora": "create_hook", "LoraLoaderBypass": "load_lora"}
"""Nodes that keep the last file by its name; their ModelOnly forms inherit from them."""

Loaded = tuple[dict[str, torch.Tensor], Any]


class LoraMismatchError(RuntimeError):
    """A LoRA was made for a model of other shapes; the model is as it was."""


def install(read: Callable[[str], Any]) -> None:
    """``read``: the stock reader of a file, called with ``return_metadata=True``."""
    global _files
    _files = FactorCache(lambda path: _read(read, path), _nbytes, CACHE_NBYTES)
    comfy.sd.load_lora_for_models = _checked(comfy.sd.load_lora_for_models)
    classes = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {})
    for name, method in _NODES.items():
        node = classes.get(name)
        if node is not None and hasattr(node, method) and not hasattr(node, "IS_CHANGED"):
            node.IS_CHANGED = classmethod(_is_changed)
            setattr(node, method, _forgetful(getattr(node, method)))


_files: FactorCache[Loaded] | None = None


def cached(path: str) -> Loaded | None:
    """Tensors (a dict of the caller's own) and metadata of a file in ComfyUI's LoRA folders; None for other files."""
    if _files is None or not _is_lora(path):
        return None
    tensors, metadata = _files.get(path)
    return dict(tensors), metadata


def _is_lora(path: str) -> bool:
    folders = sys.modules.get("folder_paths")
    if folders is None:
        return False
    given = os.path.abspath(path)
    return any(given.startswith(os.path.abspath(folder) + os.sep) for folder in folders.get_folder_paths("loras"))


def _nbytes(loaded: Loaded) -> int:
    return sum(tensor.nbytes for tensor in loaded[0].values())


def _read(read: Callable[[str], Any], path: str) -> Loaded:
    loaded: Loaded = read(path)
    broken = not_finite(loaded[0])
    if broken:
        log.warning("[lunashm] %s has NaN or infinite values in %s", Path(path).name, _some(broken))
    return loaded


def _some(names: list[str]) -> str:
    """``3 keys: a, b, c``, the first few named."""
    return f"{len(names)} key{'s' * (len(names) != 1)}: {listed(names)}"


def _is_changed(cls: Any, lora_name: Any = None, **_: Any) -> str:
    """For ComfyUI's cache of node outputs: another file, another output."""
    try:
        file = FileIdentity.of(sys.modules["folder_paths"].get_full_path_or_raise("loras", lora_name))
    except (KeyError, OSError, TypeError, AttributeError):
        return ""  # the node itself will say what is wrong
    return f"{file.size}:{file.mtime_ns}"


def _forgetful(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A node keeps the last file it read by name alone: have it ask the cache, which knows whether it changed."""

    @functools.wraps(stock)
    def load_lora(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.loaded_lora = None
        try:
            return stock(self, *args, **kwargs)
        finally:
            self.loaded_lora = None

    return load_lora


def _checked(stock: Callable[..., Any]) -> Callable[..., Any]:
    """``load_lora_for_models(model, clip, lora, ...)``: shapes checked, one warning for all keys without a layer."""

    @functools.wraps(stock)
    def load_lora_for_models(model: Any, clip: Any, lora: Any, *args: Any, **kwargs: Any) -> Any:
        given = (model, getattr(clip, "patcher", None))
        if not any(isinstance(part, SharedModelPatcher) for part in given):
            return stock(model, clip, lora, *args, **kwargs)
        name = Path(lora.original.identity.path).name if isinstance(lora, TaggedStateDict) else "LoRA"
        with _Unmatched() as unmatched:
            result = stock(model, clip, lora, *args, **kwargs)
        for before, after in zip(given, (result[0], getattr(result[1], "patcher", None)), strict=True):
            if isinstance(after, SharedModelPatcher):
                _check_shapes(name, before, after)
        meant = [key for key in unmatched.keys if clip is not None or not key.startswith(_TEXT_ENCODER)]
        if meant:
            log.warning("[lunashm] %s: no layer for %s", name, _some(meant))
        return result

    return load_lora_for_models


def _check_shapes(name: str, before: SharedModelPatcher, after: SharedModelPatcher) -> None:
    """Raises LoraMismatchError for the first of the patches that were just added that cannot fit."""
    shapes = {key: tensor.shape for key, tensor in after.model.state_dict().items()}
    for key, patches in after.patches.items():
        for _, value, _, offset, _ in patches[len(before.patches.get(key, ())) :]:
            layer = region_shape(grown_shape(before.patches.get(key, ()), shapes[key]), offset)
            theirs = misfit(value, layer)
            if theirs is not None:
                raise LoraMismatchError(
                    f"[lunashm] {name} does not fit this model: {key} is {layer}, the LoRA's is {list(theirs)}. "
                    "It was made for another kind of model; the model is as it was"
                )


class _Unmatched(logging.Filter):
    """What ComfyUI says about keys, one line each, collected in this thread."""

    PREFIXES = ("lora key not loaded: ", "NOT LOADED ")

    def __init__(self) -> None:
        super().__init__()
        self.keys: list[str] = []
        self._thread = threading.get_ident()

    def __enter__(self) -> _Unmatched:
        logging.getLogger().addFilter(self)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger().removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if threading.get_ident() != self._thread:
            return True
        message = record.getMessage()
        found = next((prefix for prefix in self.PREFIXES if message.startswith(prefix)), None)
        if found is None:
            return True
        self.keys.append(message.removeprefix(found))
        return False
