"""Weights that die with their host (``cuda-ipc``): nothing computed with them after that is ever used.

A layer that runs asks first; whatever gives a result out (a sampler, an encoder, a decoder) asks again when the device
is done, before ComfyUI can keep that result. Either raises HostLost and the prompt fails; ComfyUI is told to forget its
models, so that the next prompt loads them anew, from the next host or locally with the reason.

Weights that outlive their host are none of this module's business.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from typing import Any

import comfy.clip_vision
import comfy.samplers
import comfy.sd
import torch

from lunashm import settings
from lunashm.client import Attachment
from lunashm.client.watch import Guard
from lunashm.errors import HostLost, LunashmError

from . import hostlink
from .binding import Binding, SharedFile, binding_of

log = logging.getLogger("lunashm.comfy")

_GIVE_RESULTS_OUT: tuple[tuple[type, tuple[str, ...]], ...] = (
    (comfy.samplers.CFGGuider, ("sample",)),
    (comfy.sd.VAE, ("encode", "encode_tiled", "decode", "decode_tiled")),
    (comfy.sd.CLIP, ("encode_from_tokens", "encode_from_tokens_scheduled", "generate")),
    (comfy.clip_vision.ClipVisionModel, ("encode_image",)),
)
"""ComfyUI 0.8 lacks some of them."""


def install() -> None:
    for owner, names in _GIVE_RESULTS_OUT:
        for name in names:
            stock = getattr(owner, name, None)
            if stock is not None:
                setattr(owner, name, _checked_afterwards(stock))


def _checked_afterwards(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        patcher = getattr(self, "model_patcher", None) or getattr(self, "patcher", None)
        binding = binding_of(getattr(patcher, "model", None))
        if patcher is None or binding is None or not binding.fail_stop:
            return stock(self, *args, **kwargs)
        try:
            result = stock(self, *args, **kwargs)
            if patcher.load_device.type == "cuda":
                torch.cuda.synchronize(patcher.load_device)
        except Exception as exc:  # what it met may be memory that was gone: then that is the reason
            check(binding, exc)
            raise
        check(binding)
        return result

    return method


def check(binding: Binding, cause: Exception | None = None) -> None:
    """Raises HostLost, and has ComfyUI forget its models."""
    try:
        binding.check()
    except HostLost as exc:
        hostlink.forget_models("the host that held its weights is gone")
        raise exc from cause


def guard(model: torch.nn.Module, binding: Binding) -> None:
    """Have the parts of ``model`` ask before they run: its children, which samplers and encoders call. Idempotent."""
    if not binding.fail_stop or binding.guarded:
        return
    binding.guarded = True
    for child in model.children():
        child.register_forward_pre_hook(Guard(child, functools.partial(_check_what_is_there, weakref.ref(binding))))


def _check_what_is_there(binding: weakref.ref[Binding]) -> None:
    """A module does not keep its binding alive by being guarded."""
    found = binding()
    if found is not None:
        check(found)


def reopened(file: SharedFile) -> Attachment:
    """The bytes of a lost file from the host that is there now, waited for as a load is.

    Raises HostLost where there is none, or it has other bytes; the next prompt loads the model anew.
    """
    chosen = settings.load()
    try:
        return hostlink.patiently(
            file.path, file.attachment.reattached, chosen.wait_s if chosen.fallback == "wait" else 0.0
        )
    except LunashmError as exc:
        hostlink.forget_models("the host that held its weights is gone")
        raise HostLost(
            f"[lunashm] {file.name}: the host that held its weights is gone, and their memory with it; {exc.message}. "
            "Queue the prompt again: its models are loaded anew, locally if there is no host"
        ) from exc
