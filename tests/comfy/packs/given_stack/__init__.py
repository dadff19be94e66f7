"""A pack for tests: another pack's LORA_STACK, whatever the JSON says, and a CLIP that is none."""

from __future__ import annotations

import json
from typing import Any


class GivenStack:
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"stack": ("STRING", {})}}

    RETURN_TYPES = ("LORA_STACK", "CLIP")
    FUNCTION = "give"
    CATEGORY = "test"

    def give(self, stack: str) -> tuple[Any, None]:
        return json.loads(stack), None


NODE_CLASS_MAPPINGS = {"GivenStack": GivenStack}
