"""This ComfyUI as a client: finding the host, hearing what it says. Knows no models."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management

from lunashm.client import Attachment, Session, session_for
from lunashm.errors import HostUnavailable, LoadTimeout
from lunashm.protocol import Event, HostStopping, LoadProgress, UnloadRequested

from . import binding, devices
from .units import progress

log = logging.getLogger("lunashm.comfy")

PROGRESS_EVERY_S = 5.0
_WAIT_SLICE_S = 1.0


def session() -> Session:
    """With the host to ask now. Raises HostUnavailable where sharing cannot work, before anything is built."""
    if _flag("force_channels_last"):
        raise HostUnavailable("--force-channels-last rearranges weights in memory, which shared ones cannot be")
    found = session_for(devices.endpoint(), kind="comfyui", label=_label())
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
def _awaiting(path: str) -> Iterator[None]:
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


def patiently(path: str, ask: Callable[[float], Attachment], wait_s: float) -> Attachment:
    """``ask(seconds)`` the host for ``path`` in slices, so that ComfyUI's cancel button works meanwhile.

    Raises what ``ask`` raises, LoadTimeout after ``wait_s``.
    """
    deadline = time.monotonic() + wait_s
    with _awaiting(path):
        while True:
            left = deadline - time.monotonic()
            try:
                return ask(max(min(left, _WAIT_SLICE_S), 0.0))
            except LoadTimeout:
                comfy.model_management.throw_exception_if_processing_interrupted()
                if left <= _WAIT_SLICE_S:
                    raise


def _on_event(event: Event) -> None:
    """Called in the connection's thread."""
    if isinstance(event, LoadProgress) and event.path in _awaited:
        _tell_progress(event)
    elif isinstance(event, UnloadRequested) and binding.shows_generation(event.generation):
        forget_models(f"the host asks to let go of {event.name}")
    elif isinstance(event, HostStopping) and binding.any_lost():
        forget_models("the host that held its weights is gone")


def _tell_progress(event: LoadProgress) -> None:
    global _next_progress
    if time.monotonic() >= _next_progress:
        _next_progress = time.monotonic() + PROGRESS_EVERY_S
        come = progress(event.done, event.total, event.elapsed_s)
        log.info("[lunashm] waiting for the host to load %s: %s", event.name, come)


def forget_models(why: str) -> None:
    """Have ComfyUI drop its models as its own /free route does, between prompts: the next one loads what it needs."""
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    queue = getattr(getattr(server, "instance", None), "prompt_queue", None)
    if queue is None:
        return
    log.warning("[lunashm] %s: freeing models after the current prompt", why)
    queue.set_flag("unload_models", True)
    queue.set_flag("free_memory", True)
