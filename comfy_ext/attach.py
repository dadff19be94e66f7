"""The stock loaders, hooked: each first asks the host, and loads as ever where that cannot be.

Modes (``LUNASHM_MODE``, ``lunashm.toml``): ``auto`` loads locally with one line that says why; ``force_daemon`` raises
instead; ``force_local`` never asks.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.utils

from lunashm import settings
from lunashm.client import Attachment, Session, session_for
from lunashm.errors import HostUnavailable, LunashmError
from lunashm.paths import Endpoint
from lunashm.protocol import Event, UnloadRequested

from . import binding, trace
from .patcher import adopt

log = logging.getLogger("lunashm.comfy")

_T = TypeVar("_T")
_one_at_a_time = threading.RLock()
_said: set[str] = set()

PRIVATE_WARNING_NBYTES = 64 << 20
"""Private bytes per load above which the largest tensors are named."""


def install() -> None:
    """Hook the stock loaders. Called once, when ComfyUI imports its custom nodes."""
    trace.install_load_state_dict()
    comfy.utils.load_torch_file = _load_torch_file(comfy.utils.load_torch_file)
    for name in ("load_checkpoint_guess_config", "load_diffusion_model", "load_clip"):
        setattr(comfy.sd, name, _loader(getattr(comfy.sd, name)))
    comfy.sd.VAE.__init__ = _vae_init(comfy.sd.VAE.__init__)
    try:
        mode, address = settings.load().mode, _endpoint().url
    except LunashmError as exc:
        log.error("[lunashm] %s; models are loaded locally until that is mended", exc)
        return
    log.info("[lunashm] mode %s, host expected at %s", mode, address)


# -- the hooks -----------------------------------------------------------------------------------------------------------


def _loader(stock: Callable[..., _T]) -> Callable[..., _T]:
    """``load_checkpoint_guess_config(path, ...)``, ``load_diffusion_model(path, ...)`` and ``load_clip(paths, ...)``."""
    signature = inspect.signature(stock)
    path_parameter = next(iter(signature.parameters))

    @functools.wraps(stock)
    def load(*args: Any, **kwargs: Any) -> _T:
        if trace.active() is not None:
            return stock(*args, **kwargs)
        paths = signature.bind(*args, **kwargs).arguments[path_parameter]
        files = [paths] if isinstance(paths, str) else list(paths)
        shared_kwargs = dict(kwargs)
        if "disable_dynamic" in signature.parameters and "disable_dynamic" not in signature.bind_partial(*args).arguments:
            shared_kwargs["disable_dynamic"] = True  # ComfyUI 0.28: dynamic VRAM would copy weights into its own buffers
        return _share(files, lambda: stock(*args, **shared_kwargs), lambda: stock(*args, **kwargs), _patchers)

    return load


def _vae_init(stock: Callable[..., None]) -> Callable[..., None]:
    """``VAE(sd=...)`` as VAELoader calls it: the dict says which file it came from."""

    @functools.wraps(stock)
    def __init__(self: Any, sd: Any = None, *args: Any, **kwargs: Any) -> None:
        if trace.active() is not None or not isinstance(sd, trace.TaggedStateDict) or sd.identity is None:
            stock(self, sd, *args, **kwargs)
            return
        tensors = dict(sd)
        identity = sd.identity

        def shared() -> None:
            active = trace.active()
            if active is not None:
                active.saw_file(identity.path, identity, tensors)
            stock(self, dict(tensors), *args, **kwargs)

        _share([sd.source], shared, lambda: stock(self, dict(tensors), *args, **kwargs), lambda _: [self])

    return __init__


def _load_torch_file(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def load_torch_file(ckpt: str, *args: Any, **kwargs: Any) -> Any:
        if not ckpt.lower().endswith((".safetensors", ".sft")):
            return stock(ckpt, *args, **kwargs)
        identity = trace.FileIdentity.of(ckpt)
        loaded = stock(ckpt, *args, **kwargs)
        tensors, rest = (loaded[0], loaded[1:]) if isinstance(loaded, tuple) else (loaded, None)
        active = trace.active()
        if active is not None:
            active.saw_file(ckpt, identity, tensors)
            return loaded
        tagged = trace.TaggedStateDict(tensors)
        tagged.identity, tagged.source = identity, ckpt
        return tagged if rest is None else (tagged, *rest)

    return load_torch_file


# -- one load ------------------------------------------------------------------------------------------------------------


def _share(
    paths: list[str], shared: Callable[[], _T], local: Callable[[], _T], patched: Callable[[_T], Iterable[Any]]
) -> _T:
    """Load through the host, or locally with the reason. ``patched``: what of the result carries a patcher."""
    chosen = settings.load()
    if chosen.mode == "force_local":
        return local()
    try:
        with _one_at_a_time:
            session = _session(chosen)
            with trace.Trace() as traced:
                result = shared()
            _attach(traced, session, chosen.wait_s, list(patched(result)))
            return result
    except trace.UntraceableError as exc:
        reason: Exception = exc
    except LunashmError as exc:
        reason = exc
    names = ", ".join(os.path.basename(path) for path in paths)
    if chosen.mode == "force_daemon":
        raise type(reason)(f"{names}: mode is force_daemon, host expected at {_endpoint().url}: {reason}") from reason
    _say_once(f"{names} is loaded locally: {reason}")
    return local()


def _attach(traced: trace.Trace, session: Session, wait_s: float, holders: list[Any]) -> None:
    """Put the host's bytes in place of everything the loader took from its files, and say so."""
    for holder in holders:
        if isinstance(holder, comfy.sd.VAE) and holder.first_stage_model is not None:
            traced.settle(holder.first_stage_model, holder.vae_dtype)
    files = []
    for file in traced.files:
        rules = binding.needed_rules(file, traced)
        attachment = Attachment.open(session, file.identity.path, rules, wait_s)
        files.append(binding.bind(traced, file, attachment, session, wait_s))
    private = binding.make_private(traced, files)
    places = {(id(place.owner), place.name) for file in files for place in file.places}
    for patcher in {id(p): p for p in map(_patcher_of, holders) if p is not None}.values():
        modules = {id(module) for module in patcher.model.modules()}
        own = [file for file in files if any(id(place.owner) in modules for place in file.places)]
        adopt(patcher, binding.Binding(own, _private_nbytes(patcher.model, places)))
    for file in files:
        shared_nbytes = sum(p.owner._parameters[p.name].nbytes for p in file.places)  # type: ignore[union-attr]
        manifest = file.attachment.manifest
        log.info(
            "[lunashm] attached %s: %d tensors, %s shared, %s private",
            manifest.name, len(file.places), _size(shared_nbytes), _size(sum(slot.tensor.nbytes for slot in private)),
        )  # fmt: skip
    _warn_of_private(private)


def _private_nbytes(model: Any, places: set[tuple[int, str]]) -> int:
    return sum(
        tensor.nbytes
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None and (id(module), name) not in places
    )


def _warn_of_private(private: list[trace.Slot]) -> None:
    """I7: shared bytes are never copied by accident."""
    total = sum(slot.tensor.nbytes for slot in private)
    if total > PRIVATE_WARNING_NBYTES:
        largest = sorted(private, key=lambda slot: -slot.tensor.nbytes)[:5]
        log.warning(
            "[lunashm] %s could not be shared, because the loader rebuilds these tensors: %s%s",
            _size(total),
            ", ".join(f"{type(s.owner).__name__}.{s.name} {list(s.tensor.shape)}" for s in largest),
            " ..." if len(private) > len(largest) else "",
        )  # fmt: skip


def _patchers(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def _patcher_of(holder: Any) -> comfy.model_patcher.ModelPatcher | None:
    """A MODEL is a patcher; CLIP, VAE and CLIP_VISION have one."""
    if isinstance(holder, comfy.model_patcher.ModelPatcher):
        return holder
    return getattr(holder, "patcher", None)


# -- finding the host ----------------------------------------------------------------------------------------------------


def _endpoint() -> Endpoint:
    chosen = settings.load()
    return Endpoint.parse(chosen.endpoint) if chosen.endpoint else Endpoint.for_device(chosen.device)


def _session(chosen: settings.Settings) -> Session:
    """Raises HostUnavailable where sharing cannot work, before anything is built."""
    device = comfy.model_management.get_torch_device()
    if device.type != "cpu":
        raise HostUnavailable(f"this ComfyUI runs on {device}, and this version of lunashm shares CPU memory only")
    session = session_for(_endpoint(), kind="comfyui", label=_label())
    session.connect()
    _listen_once(session)
    return session


def _label() -> str:
    """``ComfyUI :8188``."""
    try:
        from comfy.cli_args import args

        return f"ComfyUI :{args.port}"
    except (ImportError, AttributeError):
        return "ComfyUI"


_listening: set[int] = set()


def _listen_once(session: Session) -> None:
    if id(session) not in _listening:
        _listening.add(id(session))
        session.listen(_on_event)


def _on_event(event: Event) -> None:
    """``lunashm unload --force``: let ComfyUI drop its models as its own /free route does, between prompts."""
    if not isinstance(event, UnloadRequested):
        return
    if not any(file.attachment.manifest.generation == event.generation for file in list(binding.live)):
        return
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    queue = getattr(getattr(server, "instance", None), "prompt_queue", None)
    if queue is None:
        return
    log.warning("[lunashm] the host asks to let go of %s: freeing models after the current prompt", event.name)
    queue.set_flag("unload_models", True)
    queue.set_flag("free_memory", True)


def _say_once(text: str) -> None:
    """I5: each reason once, not for every prompt."""
    if text not in _said:
        _said.add(text)
        log.warning("[lunashm] %s", text)


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB"
