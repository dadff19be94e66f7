"""What a node asks of the loads inside a ``with``, and why any of them stayed local. Knows no lunashm and no ComfyUI.

Stock loader nodes ask nothing: the settings decide. A node with settings of its own says so here, in its thread:

    with Asking(mode="force_daemon") as asked:
        model = comfy.sd.load_diffusion_model(path)
    asked.reasons  # {"flux.safetensors": "no lunashm host at ..."}
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

_here = threading.local()

unavailable = ""
"""Why nothing can be shared in this ComfyUI at all, in words; empty where it can."""


@dataclass
class Asking:
    """``mode``: instead of the setting; ``auto`` leaves it to the setting. Nests; the innermost counts.

    ``reasons``: names of the files of a load -> why it was made locally.
    """

    mode: str = "auto"
    reasons: dict[str, str] = field(default_factory=dict)
    _outer: Asking | None = None

    def __enter__(self) -> Asking:
        self._outer = current()
        _here.asking = self
        return self

    def __exit__(self, *exc: object) -> None:
        _here.asking = self._outer

    def stayed_local(self, names: str, reason: str) -> None:
        self.reasons[names] = reason


def current() -> Asking | None:
    """Of the node that runs in this thread, if it asks anything."""
    return getattr(_here, "asking", None)
