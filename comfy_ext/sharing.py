"""One load, through the host or locally with the reason: where a stock loader's result becomes a shared model."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch

from lunashm import settings
from lunashm.client import Attachment, Session
from lunashm.errors import LoadTimeout, LunashmError, ModelNotReady, SettingsError, UnsupportedFormat

from . import asking, binding, devices, hostlink
from .layers import PatchedLayers
from .patcher import adopt, check_adoptable
from .trace import Slot, Trace, UntraceableError
from .units import size

log = logging.getLogger("lunashm.comfy")

_T = TypeVar("_T")
_one_at_a_time = threading.RLock()
_said: dict[str, str] = {}

PRIVATE_WARNING_NBYTES = 64 << 20
"""Private bytes per load above which the largest tensors are named."""


def share(
    paths: list[str], shared: Callable[[], _T], local: Callable[[], _T], holders: Callable[[_T], Iterable[Any]]
) -> _T:
    """Load through the host, or locally with the reason. ``holders``: what of the result has a patcher."""
    names = ", ".join(Path(path).name for path in paths) or "model"
    try:
        chosen = settings.load()
    except SettingsError as exc:
        if _mode(None) == "force_daemon":
            raise
        _say_once(names, f"{exc}; mend that to share models")
        return local()
    mode = _mode(chosen)
    if mode == "force_local":
        _tell_node(names, f"mode {mode}")
        return local()
    try:
        with _one_at_a_time:
            result = _through_host(paths, chosen, shared, holders)
        _said.pop(names, None)
        return result
    except comfy.model_management.InterruptProcessingException:
        raise
    except (UntraceableError, LunashmError) as exc:
        reason: Exception = exc.with_traceback(None)  # its frames would keep the half-made model alive
    except Exception as exc:
        log.exception("[lunashm] sharing %s failed; please report this", names)
        reason = UntraceableError(f"sharing it failed: {exc!r}")
    unready = isinstance(reason, ModelNotReady | LoadTimeout) and chosen.fallback != "local"
    if mode == "force_daemon" or unready:  # unready: a local copy now would be a second copy in a moment
        where = f"mode {mode}, fallback {chosen.fallback}, host expected at {devices.endpoint().url}"
        raise type(reason)(f"{names}: {reason} ({where})")
    _say_once(names, str(reason))
    return local()


def _mode(chosen: settings.Settings | None) -> str:
    """A node's own mode, else the setting's."""
    asked = asking.current()
    if asked is not None and asked.mode != "auto":
        return asked.mode
    return chosen.mode if chosen is not None else "auto"


def _through_host(
    paths: list[str], chosen: settings.Settings, shared: Callable[[], _T], holders: Callable[[_T], Iterable[Any]]
) -> _T:
    """Raises LunashmError or UntraceableError where the model cannot be shared, and what the stock loader raises."""
    for path in paths:
        if not path.lower().endswith((".safetensors", ".sft")):
            raise UnsupportedFormat(f"{Path(path).name} is no safetensors file; convert it to share it")
    session = hostlink.session()
    home = devices.home_of(session.connect())
    with Trace(home) as traced:
        result = shared()
    if not traced.files:
        raise UntraceableError("its loader read no safetensors file")
    _attach(traced, session, chosen.wait_s if chosen.fallback == "wait" else 0.0, list(holders(result)))
    return result


def _attach(traced: Trace, session: Session, wait_s: float, holders: list[Any]) -> None:
    """Put the host's bytes in place of everything the loader took from its files, model by model, and say so."""
    patchers = {id(patcher.model): patcher for patcher in map(_patcher_of, holders) if patcher is not None}
    for patcher in patchers.values():
        check_adoptable(patcher)
    patchers = {root: patcher for root, patcher in patchers.items() if _can_share(patcher, traced.home)}
    for holder in holders:
        if isinstance(holder, comfy.sd.VAE) and holder.first_stage_model is not None:
            traced.settle(holder.first_stage_model, holder.vae_dtype)
    slots_of = {root: _slots(patcher, traced) for root, patcher in patchers.items()}
    everywhere = [slot for slots in slots_of.values() for slot in slots]
    rules = [binding.needed_rules(file, everywhere, traced) for file in traced.files]
    bound: dict[int, list[binding.SharedFile]] = {root: [] for root in patchers}
    for root, slots in slots_of.items():
        for file, wanted in zip(traced.files, rules, strict=True):
            if wanted is not None and binding.needed_rules(file, slots, traced) is not None:
                ask = functools.partial(Attachment.open, session, file.identity.path, wanted)
                attachment = hostlink.patiently(file.identity.path, ask, wait_s)
                bound[root].append(binding.bind(file, slots, traced, attachment, session))
    everything = [file for files in bound.values() for file in files]
    binding.make_private(traced, everything)
    private: list[tuple[str, Any]] = []
    for root, patcher in patchers.items():
        own = binding.private_tensors(patcher.model, bound[root])
        private += own
        if bound[root]:
            nbytes = sum(tensor.nbytes for _, tensor in own)
            adopt(patcher, binding.Binding(bound[root], nbytes, PatchedLayers(), traced.home))
    _report(everything, private)
    if everything and any(patcher.load_device != traced.home for patcher in patchers.values()):
        _say_tier(session)


def _slots(patcher: comfy.model_patcher.ModelPatcher, traced: Trace) -> list[Slot]:
    modules = {id(module) for module in patcher.model.modules()}
    return [slot for slot in traced.slots if id(slot.owner) in modules]


def _can_share(patcher: comfy.model_patcher.ModelPatcher, home: torch.device) -> bool:
    """False, with a line that says why, for a model that is to run on the CPU beside a host of a GPU's memory."""
    if devices.can_use(patcher.load_device, home):
        return True
    what, where = type(patcher.model).__name__, patcher.load_device
    reason = f"it runs on {where}, and the host lends memory of {home}"
    log.warning("[lunashm] %s is loaded locally: %s", what, reason)
    _tell_node(what, reason)
    return False


def _say_tier(session: Session) -> None:
    """Once: what this kind of sharing saves, and what it does not."""
    if "tier" not in _said:
        _said["tier"] = session.endpoint.url
        log.info(
            "[lunashm] the host lends RAM: one copy there for all, and one in this ComfyUI's own VRAM while in use; "
            "to share VRAM, too: lunashm serve --device cuda:N"
        )


def _report(files: list[binding.SharedFile], private: list[tuple[str, Any]]) -> None:
    """One line a file, and I7: what could not be shared is named if it is much."""
    private_nbytes = total = sum(tensor.nbytes for _, tensor in private)
    by_name: dict[str, list[binding.SharedFile]] = {}
    for file in files:
        by_name.setdefault(file.name, []).append(file)
    for name, parts in by_name.items():
        tensors, nbytes = sum(len(part.places) for part in parts), sum(part.nbytes for part in parts)
        figures = name, tensors, size(nbytes), size(private_nbytes)
        log.info("[lunashm] attached %s: %d tensors, %s shared, %s private", *figures)
        private_nbytes = 0  # what the loader made itself belongs to no file: it is counted once
    if total > PRIVATE_WARNING_NBYTES:
        largest = sorted(private, key=lambda named: -named[1].nbytes)[:5]
        names = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in largest)
        more = " ..." if len(private) > len(largest) else ""
        reason = "could not be shared, because the loader makes or changes these tensors itself"
        log.warning("[lunashm] %s %s: %s%s", size(total), reason, names, more)


def _patcher_of(holder: Any) -> comfy.model_patcher.ModelPatcher | None:
    """A MODEL is a patcher; CLIP, VAE and CLIP_VISION have one."""
    if isinstance(holder, comfy.model_patcher.ModelPatcher):
        return holder
    return getattr(holder, "patcher", None)


def _tell_node(names: str, reason: str) -> None:
    asked = asking.current()
    if asked is not None:
        asked.stayed_local(names, reason)


def _say_once(names: str, reason: str) -> None:
    """I5: each reason once per file, until it could be shared; not for every prompt. A node is told every time."""
    _tell_node(names, reason)
    if _said.get(names) != reason:
        _said[names] = reason
        log.warning("[lunashm] %s is loaded locally, until ComfyUI unloads it: %s", names, reason)
