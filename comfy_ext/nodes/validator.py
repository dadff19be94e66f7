"""Luna LoRA Validator: whether the LoRAs that a prompt and a stack name are on the disk. Loads nothing."""

from __future__ import annotations

from typing import Any

from . import lora_files, lora_names, lora_tags
from .lora_plan import Plan, plan
from .lora_stack import read as lora_stack_of

_witness = lora_files.Witness()


class LunaLoRAValidator:
    DESCRIPTION = (
        "Checks the LoRA names in a prompt and in a stack against the files in the loras folders, as the Luna Config "
        "Gateway would find them, and says what it would leave out and why."
    )
    CATEGORY = "Luna"
    FUNCTION = "validate"
    OUTPUT_NODE = True
    RETURN_TYPES = ("BOOLEAN", "STRING", "STRING")
    RETURN_NAMES = ("all_found", "report", "missing")
    OUTPUT_TOOLTIPS = (
        "False if a name has no file, or a tag cannot be read.",
        "A line for each LoRA: the file that its name means, or what is wrong.",
        "The names without a file, one a line.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        return {
            "required": {},
            "optional": {
                "text": ("STRING", {"multiline": True, "tooltip": "A prompt with <lora:name:weight> tags."}),
                "lora_stack": ("LORA_STACK", {"tooltip": "LoRAs from a Luna LoRA Stack or another pack's."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    @classmethod
    def IS_CHANGED(cls, unique_id: str = "", **_: Any) -> int:  # noqa: N802 - ComfyUI's name
        return _witness.turn(unique_id)

    def validate(self, text: str = "", lora_stack: Any = None, unique_id: str = "") -> dict[str, Any]:
        """Raises ValueError for a stack that is none."""
        stack, tagged = lora_stack_of(lora_stack), lora_tags.parse(text or "")
        entries = [*stack, *tagged.loras]
        _witness.saw(unique_id, [entry.name for entry in entries])
        planned = plan(stack, tagged.loras, lora_files.find)
        endless = [f"'{entry.name}' has the strengths {entry.strengths}" for entry in entries if not entry.finite]
        wrong = [*tagged.complaints, *endless]
        report = _report(planned, wrong)
        result = (not planned.missing and not wrong, report, "\n".join(planned.missing))
        return {"ui": {"text": (report,)}, "result": result}


def _report(planned: Plan, wrong: list[str]) -> str:
    lines = [f"✓ {asked.name}: {file} {asked.strengths}" for file, asked in planned.loras.items()]
    for name in planned.missing:
        close = lora_names.closest(name, lora_files.listed())
        lines.append(f"✗ {name}: not found{f'; is {close} meant?' if close else ''}")
    lines += [f"⚠ {sentence}" for sentence in (*wrong, *planned.doubts, *planned.conflicts)]
    return "\n".join(lines) or "No LoRAs are named."
