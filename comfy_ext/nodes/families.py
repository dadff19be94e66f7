"""Families of models: how to tell them, and which text encoders each needs. Data, and lookups in it.

ComfyUI detects the family from a file's tensors; here is only what a person calls it and what must be chosen beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.sd

AUTO = "auto"


@dataclass(frozen=True)
class Family:
    """``config``: class in comfy.supported_models, subclasses included. ``clip_type``: of comfy.sd.CLIPType.

    ``encoders``: what it was trained with, in ComfyUI's order; ``least`` of them have to be there.
    """

    name: str
    config: str
    clip_type: str
    encoders: tuple[str, ...]
    least: int = 0

    def needs(self) -> str:
        """``SDXL needs CLIP-L and CLIP-G``."""
        *most, last = self.encoders
        both = f"{', '.join(most)} and {last}" if most else last
        few = f" (at least {self.fewest} of them)" if self.fewest < len(self.encoders) else ""
        return f"{self.name} needs {both}{few}"

    @property
    def fewest(self) -> int:
        return self.least or len(self.encoders)


_CLIP_L, _CLIP_G, _T5 = "CLIP-L", "CLIP-G", "T5-XXL"
_QWEN_VL = "Qwen2.5-VL 7B"

FAMILIES = (
    Family("SD1.5", "SD15", "STABLE_DIFFUSION", (_CLIP_L,)),
    Family("SD2", "SD20", "STABLE_DIFFUSION", ("OpenCLIP-H",)),
    Family("SDXL", "SDXL", "STABLE_DIFFUSION", (_CLIP_L, _CLIP_G)),
    Family("SDXL Refiner", "SDXLRefiner", "STABLE_DIFFUSION", (_CLIP_G,)),
    Family("Stable Cascade", "Stable_Cascade_C", "STABLE_CASCADE", (_CLIP_G,)),
    Family("SD3", "SD3", "SD3", (_CLIP_L, _CLIP_G, _T5), least=1),
    Family("Flux", "Flux", "FLUX", (_CLIP_L, _T5)),
    Family("Flux 2", "Flux2", "FLUX2", ("Mistral Small 3 or Qwen3",)),
    Family("Chroma", "Chroma", "CHROMA", (_T5,)),
    Family("Z-Image", "ZImage", "LUMINA2", ("Qwen3 4B",)),
    Family("Lumina 2", "Lumina2", "LUMINA2", ("Gemma 2 2B",)),
    Family("Wan", "WAN21_T2V", "WAN", ("UMT5-XXL",)),
    Family("Qwen-Image", "QwenImage", "QWEN_IMAGE", (_QWEN_VL,)),
    Family("HiDream", "HiDream", "HIDREAM", (_CLIP_L, _CLIP_G, _T5, "Llama 3.1 8B"), least=1),
    Family("HunyuanVideo 1.5", "HunyuanVideo15", "HUNYUAN_VIDEO_15", (_QWEN_VL, "ByT5 small"), least=1),
    Family("HunyuanImage 2.1", "HunyuanImage21", "HUNYUAN_IMAGE", (_QWEN_VL, "ByT5 small"), least=1),
    Family("HunyuanVideo", "HunyuanVideo", "HUNYUAN_VIDEO", (_CLIP_L, "LLaVA-Llama-3 8B")),
    Family("HunyuanDiT", "HunyuanDiT", "HUNYUAN_DIT", ("Chinese CLIP (BERT)", "mT5-XL")),
    Family("LTX-Video", "LTXV", "LTXV", (_T5,)),
    Family("Mochi", "GenmoMochi", "MOCHI", (_T5,)),
    Family("Cosmos", "CosmosT2V", "COSMOS", ("T5-XXL 1.0",)),
    Family("Cosmos Predict2", "CosmosT2IPredict2", "COSMOS", ("T5-XXL 1.0",)),
    Family("PixArt", "PixArtAlpha", "PIXART", (_T5,)),
    Family("AuraFlow", "AuraFlow", "STABLE_DIFFUSION", ("Pile-T5-XL",)),
    Family("OmniGen2", "Omnigen2", "OMNIGEN2", ("Qwen2.5-VL 3B",)),
    Family("Kandinsky 5", "Kandinsky5", "KANDINSKY5", (_CLIP_L, _QWEN_VL)),
    Family("Kandinsky 5 Image", "Kandinsky5Image", "KANDINSKY5_IMAGE", (_CLIP_L, _QWEN_VL)),
    Family("CogVideoX", "CogVideoX_T2V", "COGVIDEOX", (_T5,)),
    Family("Stable Audio", "StableAudio", "STABLE_AUDIO", ("T5 base",)),
    Family("ACE-Step", "ACEStep", "ACE", ("UMT5 base",)),
)
_BY_NAME = {family.name: family for family in FAMILIES}
_BY_CONFIG = {family.config: family for family in FAMILIES}


def choices() -> list[str]:
    """``auto`` and every family whose text encoders this ComfyUI can load."""
    return [AUTO, *(family.name for family in FAMILIES if hasattr(comfy.sd.CLIPType, family.clip_type))]


def named(name: str) -> Family | None:
    """None for ``auto``."""
    return _BY_NAME.get(name)


def family_of(model: Any) -> Family | None:
    """Of a MODEL, as ComfyUI detected it; None for one that is not in the table."""
    config = getattr(model.model, "model_config", None)
    return next((_BY_CONFIG[c.__name__] for c in type(config).__mro__ if c.__name__ in _BY_CONFIG), None)
