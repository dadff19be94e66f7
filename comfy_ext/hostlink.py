"""This ComfyUI as a client: finding the host, hearing what it says. Knows no models."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import weakref
from collections.abc import Iterator
from typing import Any

import comfy.model_management

from lunashm import settings
from lunashm.client import Session, session_for
from lunashm.errors import HostUnavailable
from lunashm.paths import Endpoint
from lunashm.protocol import Event, LoadProgress, UnloadRequested

from . import binding
from .units import size

log = logging.getLogger("lunashm.comfy")

PROGRESS_EVERY_S = 5.0


def endpoint() -> Endpoint:
    chosen = settings.load()
    return Endpoint.parse(chosen.endpoint) if chosen.endpoint else Endpoint.for_device(chosen.device)


def session() -> Session:
    """Raises HostUnavailable where sharing cannot work, before anything is built."""
    device = comfy.model_management.get_torch_device()
    if device.type != "cpu":
        raise HostUnavailable(f"this ComfyUI runs on {device}, and this version of lunashm shares CPU memory only")
    if _flag("force_channels_last"):
        raise HostUnavailable("--force-channels-last rearranges weights in memory, which shared ones cannot be")
    found = session_for(endpoint(), kind="comfyui", label=_label())
    found.connect()
    _listen_once(found)
    return found


def _flag(name: str) -> Any:
    """A command line argument of this ComfyUI; None where this version has no such."""
    try:
        from comfy.cli_args import args  # noqa: PLC0415 - parses the command line when imported
    except ImportError:
        return None
    return getattr(args, name, None)


def _label() -> str:
    """``ComfyUI :8188``."""
    port = _flag("port")
    return f"ComfyUI :{port}" if port else "ComfyUI"


_listening: weakref.WeakSet[Session] = weakref.WeakSet()
_awaited: set[str] = set()
_next_progress = 0.0


@contextlib.contextmanager
def awaiting(path: str) -> Iterator[None]:
    """While inside, the host's progress with ``path`` is logged."""
    _awaited.add(path)
    try:
        yield
    finally:
        _awaited.discard(path)


def _listen_once(session: Session) -> None:
    if session not in _listening:
        _listening.add(session)
        session.listen(_on_event)


def _on_event(event: Event) -> None:
    """Called in the connection's thread."""
    if isinstance(event, LoadProgress) and event.path in _awaited:
        _tell_progress(event)
    elif isinstance(event, UnloadRequested):
        _let_go(event)


def _tell_progress(event: LoadProgress) -> None:
    global _next_progress
    if time.monotonic() >= _next_progress:
        _next_progress = time.monotonic() + PROGRESS_EVERY_S
        percent = 100 * event.done // max(event.total, 1)
        log.info("[lunashm] waiting for the host to load %s: %d%% of %s", event.name, percent, size(event.total))


def _let_go(event: UnloadRequested) -> None:
    """``lunashm unload --force``: have ComfyUI drop its models as its own /free route does, between prompts."""
    if not binding.shows_generation(event.generation):
        return
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    queue = getattr(getattr(server, "instance", None), "prompt_queue", None)
    if queue is None:
        return
    log.warning("[lunashm] the host asks to let go of %s: freeing models after the current prompt", event.name)
    queue.set_flag("unload_models", True)
    queue.set_flag("free_memory", True)
