"""One LoRA as a person asked for it: a name and two strengths. Knows neither files nor ComfyUI."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class LoraEntry:
    """``name`` as it was written; it may lack folder and extension."""

    name: str
    model_strength: float
    clip_strength: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.model_strength) and math.isfinite(self.clip_strength)

    @property
    def strengths(self) -> str:
        """``(0.8, 0.6)``: model, CLIP."""
        return f"({self.model_strength:g}, {self.clip_strength:g})"

    def check(self) -> None:
        """Raises ValueError for strengths that would make every weight NaN."""
        if not self.finite:
            raise ValueError(
                f"LoRA '{self.name}' is to have the strengths {self.strengths} for model and CLIP; "
                "they must be finite numbers"
            )
