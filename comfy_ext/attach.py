"""The stock loaders, hooked: each first asks the host, and loads as ever where that cannot be.

Modes (``LUNASHM_MODE``, ``lunashm.toml``): ``auto`` loads locally with one line that says why; ``force_daemon`` raises
instead; ``force_local`` never asks.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import comfy.sd
import comfy.utils
import torch

from lunashm import settings
from lunashm.errors import LunashmError

from . import devices, failstop, loras, trace
from .patcher import protect_weights, show_patched_weights
from .sharing import share

log = logging.getLogger("lunashm.comfy")

_T = TypeVar("_T")

_INSTALLED = "_lunashm_installed"
_SUFFIXES = (".safetensors", ".sft")


def install() -> None:
    """Hook the stock loaders. Called once, when ComfyUI imports its custom nodes."""
    if hasattr(comfy.sd, _INSTALLED):
        log.warning("[lunashm] the extension is in custom_nodes twice; the first one is used, remove the other")
        return
    setattr(comfy.sd, _INSTALLED, True)
    trace.install_load_state_dict()
    devices.install()
    protect_weights()
    show_patched_weights()
    failstop.install()
    loras.install(_reader(comfy.utils.load_torch_file))
    comfy.utils.load_torch_file = _load_torch_file(comfy.utils.load_torch_file)
    for name in ("load_checkpoint_guess_config", "load_diffusion_model", "load_clip"):
        setattr(comfy.sd, name, _loader(getattr(comfy.sd, name)))
    comfy.sd.VAE.__init__ = _vae_init(comfy.sd.VAE.__init__)
    try:
        mode, address = settings.load().mode, devices.endpoint().url
    except LunashmError as exc:
        log.error("[lunashm] %s; models are loaded locally until that is mended", exc)
        return
    log.info("[lunashm] mode %s, host expected at %s", mode, address)


def _loader(stock: Callable[..., _T]) -> Callable[..., _T]:
    """``load_checkpoint_guess_config(path)``, ``load_diffusion_model(path)`` and ``load_clip(paths)``, hooked."""
    parameters = inspect.signature(stock).parameters

    @functools.wraps(stock)
    def load(*args: Any, **kwargs: Any) -> _T:
        if trace.active() is not None:
            return stock(*args, **kwargs)
        shared_kwargs = dict(kwargs)
        if "disable_dynamic" in list(parameters)[len(args) :]:
            shared_kwargs["disable_dynamic"] = True  # ComfyUI 0.28: dynamic VRAM copies weights into its own buffers
        files = _paths(args[0] if args else next(iter(kwargs.values()), ()))
        return share(files, lambda: stock(*args, **shared_kwargs), lambda: stock(*args, **kwargs), _holders)

    return load


def _paths(value: Any) -> list[str]:
    """The file or files a loader is called with, for messages and the check of their kind."""
    many = value if isinstance(value, list | tuple) else [value]
    return [os.fsdecode(path) for path in many if isinstance(path, str | os.PathLike)]


def _holders(result: Any) -> Iterable[Any]:
    return result if isinstance(result, tuple) else [result]


def _vae_init(stock: Callable[..., None]) -> Callable[..., None]:
    """``VAE(sd=...)`` as VAELoader calls it: the dict says which file it came from."""

    @functools.wraps(stock)
    def init(self: Any, sd: Any = None, *args: Any, **kwargs: Any) -> None:
        file = sd.original if isinstance(sd, trace.TaggedStateDict) else None
        if trace.active() is not None or file is None:
            stock(self, sd, *args, **kwargs)
            return
        tensors = dict(sd)  # what the caller made of it; only what still is the file's will be shared

        def shared() -> None:
            active = trace.active()
            if active is not None:
                active.saw_file(file)
            stock(self, dict(tensors), *args, **kwargs)

        share([file.identity.path], shared, lambda: stock(self, dict(tensors), *args, **kwargs), lambda _: [self])

    return init


def _reader(stock: Callable[..., Any]) -> Callable[[str], Any]:
    def read(path: str) -> Any:
        with torch.inference_mode(False):
            return stock(path, safe_load=True, return_metadata=True)

    return read


def _load_torch_file(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Tell the active trace which file was read; else tag the dict, for a VAE that may be made of it."""

    @functools.wraps(stock)
    def load_torch_file(ckpt: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(ckpt, str) or not ckpt.lower().endswith(_SUFFIXES) or not Path(ckpt).is_file():
            return stock(ckpt, *args, **kwargs)
        identity = trace.FileIdentity.of(ckpt)
        plain = trace.active() is None and not args and kwargs.get("device") is None
        lora = loras.cached(ckpt) if plain else None
        if lora is not None:
            loaded = lora if kwargs.get("return_metadata") else lora[0]
        else:
            with torch.inference_mode(False):  # so that writes to the file's tensors are counted
                loaded = stock(ckpt, *args, **kwargs)
        tensors, rest = (loaded[0], loaded[1:]) if isinstance(loaded, tuple) else (loaded, None)
        if type(tensors) is not dict or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
            return loaded  # another pack's lazy dict: its business
        file = trace.FileTensors(identity, tensors)
        active = trace.active()
        if active is not None:
            active.saw_file(file)
            return loaded
        tagged = trace.TaggedStateDict(tensors)
        tagged.original = file
        return tagged if rest is None else (tagged, *rest)

    return load_torch_file
