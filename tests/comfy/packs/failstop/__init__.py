"""A pack for tests: shared memory counts as memory that dies with its host, and a node kills that host when told to.

So what a ComfyUI on ``cuda-ipc`` has to do can be seen without a GPU; the bytes stay, which only makes it stricter.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from lunashm.memory.posix import PosixRung

PosixRung.outlives_host = False


class KillHostAtStep:
    """Ends process ``pid`` when the model is called for the ``step``-th time; ``after``: when that call is done."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",), "pid": ("INT", {"max": 1 << 31}), "step": ("INT", {}), "after": ("BOOLEAN", {})
            }
        }  # fmt: skip

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "test"

    def patch(self, model: Any, pid: int, step: int, after: bool) -> tuple[Any]:
        model = model.clone()
        calls = iter(range(1, 1 << 30))

        def wrapper(apply_model: Any, options: dict[str, Any]) -> Any:
            due = next(calls) == step
            if due and not after:
                _kill(pid)
            result = apply_model(options["input"], options["timestep"], **options["c"])
            if due and after:
                _kill(pid)
            return result

        model.set_model_unet_function_wrapper(wrapper)
        return (model,)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


NODE_CLASS_MAPPINGS = {"KillHostAtStep": KillHostAtStep}
