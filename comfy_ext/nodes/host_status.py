"""Luna Host Status: what the host holds and for whom, as text for people and JSON for workflows."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from .. import asking
from ..units import size


class LunaHostStatus:
    """Asks the host each time it runs."""

    CATEGORY = "Luna"
    DESCRIPTION = "Shows the lunashm host of this ComfyUI: its models, clients, and what sharing them saves."
    FUNCTION = "ask"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("text", "json")
    OUTPUT_TOOLTIPS = (
        "A line for the host, one for each model, one for this ComfyUI.",
        'The same as JSON: {"host": ..., "models": [...], "here": [...]}; "error" where there is no host.',
    )
    SEARCH_ALIASES: ClassVar = ["lunashm", "daemon", "memory", "vram"]

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        tooltip = "Not used: connect a model to ask once that is loaded."
        return {"required": {}, "optional": {"model": ("MODEL", {"tooltip": tooltip})}}

    @classmethod
    def IS_CHANGED(cls, **_: Any) -> float:  # noqa: N802 - ComfyUI's name
        return float("nan")  # never equal to the last time

    def ask(self, model: Any = None) -> dict[str, Any]:
        state = _state()
        text = "\n".join(_lines(state))
        return {"ui": {"text": [text]}, "result": (text, json.dumps(state, indent=2))}


def _state() -> dict[str, Any]:
    """``error`` and its ``code`` in place of the host's part where there is none."""
    if asking.unavailable:
        return {"error": asking.unavailable, "code": "not_installed", "here": []}
    import msgspec  # noqa: PLC0415 - comes with lunashm

    from lunashm.errors import LunashmError  # noqa: PLC0415
    from lunashm.protocol import GetStatus  # noqa: PLC0415

    from .. import hostlink  # noqa: PLC0415 - needs lunashm
    from ..binding import shown_here  # noqa: PLC0415

    here = [{"model": name, "shared_nbytes": nbytes, "from": lender} for name, nbytes, lender in shown_here()]
    try:
        answer = hostlink.session().request(GetStatus())
    except LunashmError as exc:
        return {"error": exc.message, "code": exc.code, "here": here}
    state: dict[str, Any] = msgspec.to_builtins(answer)
    return {name: value for name, value in state.items() if name != "type"} | {"here": here}


def _lines(state: dict[str, Any]) -> list[str]:
    here = [f"here: {file['model']}: {size(file['shared_nbytes'])} from {file['from']}" for file in state["here"]]
    if "error" in state:
        return [f"no host: {state['error']}", *(here or ["here: nothing is shared"])]
    host = state["host"]
    minutes = int(state["uptime_s"] // 60)
    models = [
        f"{m['name']}: {size(m['nbytes'])}, {m['state']}, {m['clients']} client{'s' * (m['clients'] != 1)}"
        for m in state["models"]
    ]
    return [
        f"host at {host['endpoint']}: {host['device_name']}, {host['rung']}, {host['version']}, up {minutes} min",
        f"{size(state['shared_nbytes'])} shared by {state['clients']} clients, {size(state['saved_nbytes'])} saved",
        *(models or ["no models are loaded"]),
        *(here or ["here: nothing is shared"]),
    ]
