"""One LoRA put onto MODEL and CLIP as the stock LoraLoader does it; each half goes where that one's weights are."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import comfy.sd
import comfy.utils

from . import lora_files
from .lora_entry import LoraEntry
from .origin import is_shared


@dataclass(frozen=True)
class AppliedLora:
    """``name`` as it was asked for, ``file`` below the loras folder. ``..._to``: shared or local; ``..._patches``: how
    many weights it changes there.
    """

    name: str
    file: str
    model_strength: float
    clip_strength: float
    model_to: str
    clip_to: str
    model_patches: int = 0
    clip_patches: int = 0

    @property
    def idle(self) -> bool:
        """Strength 0 for both: nothing was done."""
        return self.model_strength == 0 and self.clip_strength == 0

    def line(self, size: int) -> str:
        """For the log; ``size``: of the stack with this LoRA."""
        if self.idle:
            return f"LoRA '{self.file}' has strength 0 for MODEL and CLIP, not applied"
        model = f"MODEL {self.model_to} ({self.model_strength:g})"
        clip = f"CLIP {self.clip_to} ({self.clip_strength:g})"
        lacks = [half for half, patches in (("MODEL", self.model_patches), ("CLIP", self.clip_patches)) if not patches]
        nothing = f"; it has nothing for {' and '.join(lacks)}" if lacks else ""
        return f"LoRA '{self.file}' -> {model}, {clip}; stack size {size}{nothing}"


def apply(model: Any, clip: Any, file: str, asked: LoraEntry) -> tuple[Any, Any, AppliedLora]:
    """``model`` and ``clip`` stay as they are: clones come back. Raises what a stock LoraLoader would."""
    strengths = (asked.model_strength, asked.clip_strength)
    to = ["shared" if is_shared(holder) else "local" for holder in (model, clip)]
    if strengths == (0, 0):
        return model, clip, AppliedLora(asked.name, file, *strengths, *to)
    path = lora_files.path_of(file)
    tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    keeps = "lora_metadata" in inspect.signature(comfy.sd.load_lora_for_models).parameters  # ComfyUI 0.8 has it not
    extra = {"lora_metadata": metadata} if keeps else {}
    with_model, with_clip = comfy.sd.load_lora_for_models(model, clip, tensors, *strengths, **extra)
    patches = [_patches(with_model) - _patches(model), _patches(with_clip.patcher) - _patches(clip.patcher)]
    return with_model, with_clip, AppliedLora(asked.name, file, *strengths, *to, *patches)


def _patches(patcher: Any) -> int:
    return sum(len(patches) for patches in patcher.patches.values())
