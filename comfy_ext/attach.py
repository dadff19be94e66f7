"""The stock loaders, hooked: each first asks the host, and loads as ever where that cannot be.

Modes (``LUNASHM_MODE``, ``lunashm.toml``): ``auto`` loads locally with one line that says why; ``force_daemon`` raises
instead; ``force_local`` never asks.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_patcher
import comfy.sd
import comfy.utils

from lunashm import settings
from lunashm.client import Attachment, Session
from lunashm.errors import LoadTimeout, LunashmError, ModelNotReady, SettingsError

from . import binding, hostlink, trace
from .hostlink import size
from .patcher import adopt, check_adoptable

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
        mode, address = settings.load().mode, hostlink.endpoint().url
    except LunashmError as exc:
        log.error("[lunashm] %s; models are loaded locally until that is mended", exc)
        return
    log.info("[lunashm] mode %s, host expected at %s", mode, address)


def _loader(stock: Callable[..., _T]) -> Callable[..., _T]:
    """``load_checkpoint_guess_config(path)``, ``load_diffusion_model(path)`` and ``load_clip(paths)``, hooked."""
    signature = inspect.signature(stock)
    path_parameter = next(iter(signature.parameters))

    @functools.wraps(stock)
    def load(*args: Any, **kwargs: Any) -> _T:
        if trace.active() is not None:
            return stock(*args, **kwargs)
        paths = signature.bind(*args, **kwargs).arguments[path_parameter]
        files = [paths] if isinstance(paths, str) else list(paths)
        shared_kwargs = dict(kwargs)
        by_position = signature.bind_partial(*args).arguments
        if "disable_dynamic" in signature.parameters and "disable_dynamic" not in by_position:
            shared_kwargs["disable_dynamic"] = True  # ComfyUI 0.28: dynamic VRAM copies weights into its own buffers
        return _share(files, lambda: stock(*args, **shared_kwargs), lambda: stock(*args, **kwargs), _patchers)

    return load


def _vae_init(stock: Callable[..., None]) -> Callable[..., None]:
    """``VAE(sd=...)`` as VAELoader calls it: the dict says which file it came from."""

    @functools.wraps(stock)
    def init(self: Any, sd: Any = None, *args: Any, **kwargs: Any) -> None:
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

    return init


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


def _share(
    paths: list[str], shared: Callable[[], _T], local: Callable[[], _T], patched: Callable[[_T], Iterable[Any]]
) -> _T:
    """Load through the host, or locally with the reason. ``patched``: what of the result carries a patcher."""
    try:
        chosen = settings.load()
    except SettingsError as exc:
        _say_once(f"{exc}; models are loaded locally until that is mended")
        return local()
    if chosen.mode == "force_local":
        return local()
    try:
        with _one_at_a_time:
            session = hostlink.session()
            with trace.Trace() as traced:
                result = shared()
            _attach(traced, session, chosen.wait_s if chosen.fallback == "wait" else 0.0, list(patched(result)))
            return result
    except (trace.UntraceableError, LunashmError) as exc:
        reason = exc
    names = ", ".join(Path(path).name for path in paths)
    unready = isinstance(reason, ModelNotReady | LoadTimeout) and chosen.fallback != "local"
    if chosen.mode == "force_daemon" or unready:  # unready: a local copy now would be a second copy in a moment
        where = f"mode {chosen.mode}, fallback {chosen.fallback}, host expected at {hostlink.endpoint().url}"
        raise type(reason)(f"{names}: {reason} ({where})") from reason
    _say_once(f"{names} is loaded locally: {reason}")
    return local()


def _attach(traced: trace.Trace, session: Session, wait_s: float, holders: list[Any]) -> None:
    """Put the host's bytes in place of everything the loader took from its files, and say so."""
    patchers = {id(patcher): patcher for patcher in map(_patcher_of, holders) if patcher is not None}
    for patcher in patchers.values():
        check_adoptable(patcher)
    for holder in holders:
        if isinstance(holder, comfy.sd.VAE) and holder.first_stage_model is not None:
            traced.settle(holder.first_stage_model, holder.vae_dtype)
    files = []
    for file in traced.files:
        rules = binding.needed_rules(file, traced)
        if rules is None:
            log.info(
                "[lunashm] no weights of %s are used as they are stored; nothing of it is shared", file.identity.path
            )
            continue
        with hostlink.awaiting(file.identity.path):
            attachment = Attachment.open(session, file.identity.path, rules, wait_s)
        files.append(binding.bind(traced, file, attachment, session, wait_s))
    private = binding.make_private(traced, files)
    for patcher in patchers.values():
        modules = {id(module) for module in patcher.model.modules()}
        own = [file for file in files if any(place.key[0] in modules for place in file.places)]
        if own:
            adopt(patcher, binding.Binding(own, _private_nbytes(patcher.model, own)))
    _report(files, private)


def _report(files: list[binding.SharedFile], private: list[trace.Slot]) -> None:
    """One line a file, and I7: what could not be shared is named if it is much."""
    private_nbytes = sum(slot.tensor.nbytes for slot in private)
    for file in files:
        log.info(
            "[lunashm] attached %s: %d tensors, %s shared, %s private",
            file.attachment.manifest.name, len(file.places), size(file.nbytes), size(private_nbytes),
        )  # fmt: skip
        private_nbytes = 0  # the loader's own tensors belong to no file: they are counted once
    total = sum(slot.tensor.nbytes for slot in private)
    if total > PRIVATE_WARNING_NBYTES:
        largest = sorted(private, key=lambda slot: -slot.tensor.nbytes)[:5]
        names = ", ".join(f"{type(slot.owner).__name__}.{slot.name} {list(slot.tensor.shape)}" for slot in largest)
        more = " ..." if len(private) > len(largest) else ""
        reason = "could not be shared, because the loader rebuilds these tensors"
        log.warning("[lunashm] %s %s: %s%s", size(total), reason, names, more)


def _private_nbytes(model: Any, files: list[binding.SharedFile]) -> int:
    """Bytes of parameters and buffers that belong to this process alone."""
    placed = {place.key for file in files for place in file.places}
    return sum(
        tensor.nbytes
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None and (id(module), name) not in placed
    )


def _patchers(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple) else [result]


def _patcher_of(holder: Any) -> comfy.model_patcher.ModelPatcher | None:
    """A MODEL is a patcher; CLIP, VAE and CLIP_VISION have one."""
    if isinstance(holder, comfy.model_patcher.ModelPatcher):
        return holder
    return getattr(holder, "patcher", None)


def _say_once(text: str) -> None:
    """I5: each reason once, not for every prompt."""
    if text not in _said:
        _said.add(text)
        log.warning("[lunashm] %s", text)
