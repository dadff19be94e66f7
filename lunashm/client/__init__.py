"""The client library: attach to a model that a host on this machine has loaded. Needs no ComfyUI (I10).

    import lunashm.client

    with lunashm.client.attach("/models/sd15.safetensors") as model:
        model.load_into(module)
        style = model.apply_lora("/loras/style.safetensors", strength=0.8)

Names are resolved on first use, so that a control tool can import :mod:`lunashm.client.connection` without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lunashm.client.attachment import Attachment
    from lunashm.client.lora import AppliedLora
    from lunashm.client.opening import attach, rules_of
    from lunashm.client.session import Session, session_for

__all__ = ["AppliedLora", "Attachment", "Session", "attach", "rules_of", "session_for"]

_HOMES = {
    "AppliedLora": "lora",
    "Attachment": "attachment", "attach": "opening", "rules_of": "opening",
    "Session": "session", "session_for": "session",
}  # fmt: skip


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module of that name holds
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
