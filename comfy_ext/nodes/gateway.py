"""Luna Config Gateway: prompts with LoRA tags, a stack, clip skip and a size, made what a sampler needs.

What comes out is what the stock graph makes: a LoraLoader for each LoRA, CLIPSetLastLayer, CLIPTextEncode twice and an
empty latent. Knows no host: MODEL and CLIP may each be shared or local.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

from . import latents, lora_applying, lora_files, lora_stack, lora_tags
from .lora_applying import AppliedLora
from .lora_plan import Plan, plan
from .origin import origin_of

log = logging.getLogger("lunashm.comfy")

_NAME = "[LunaConfigGateway]"
_MOST_PIXELS = 16384  # a side, as for stock's empty latents
_witness = lora_files.Witness()


class LunaConfigGateway:
    DESCRIPTION = (
        "Applies the LoRAs of a stack and of <lora:name:weight> or <lora:name:weight:clip_weight> tags in both "
        "prompts, each once; sets clip skip; encodes the prompts without their tags; makes an empty latent that fits "
        "the model. A tag wins over the stack, a later tag over an earlier one. A LoRA that is not found is one "
        "warning; so is a tag that cannot be read, and it does not reach the text encoder."
    )
    CATEGORY = "Luna"
    FUNCTION = "configure"
    RETURN_TYPES = (
        "MODEL", "CLIP", "VAE", "CONDITIONING", "CONDITIONING", "LATENT", "STRING", "STRING", "LORA_STACK", "STRING",
    )  # fmt: skip
    RETURN_NAMES = (
        "model", "clip", "vae", "positive", "negative", "latent", "positive_text", "negative_text", "lora_stack",
        "metadata",
    )  # fmt: skip
    OUTPUT_TOOLTIPS = (
        "The model with the LoRAs.",
        "The text encoders with the LoRAs and clip skip.",
        "The VAE as it came in.",
        "The positive prompt, encoded.",
        "The negative prompt, encoded.",
        "An empty latent of the given size for this model; of one frame where it makes videos.",
        "The positive prompt without its tags.",
        "The negative prompt without its tags.",
        "What was applied. It is in MODEL and CLIP already: for another model, or to be saved with the picture.",
        "JSON: LoRAs and where each half went, names not found, warnings, prompts, size, where the weights are from.",
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - ComfyUI's name
        prompt = {"multiline": True, "dynamicPrompts": True}
        side = {"default": 512, "min": 16, "max": _MOST_PIXELS, "step": 8}
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "Shared or local."}),
                "clip": ("CLIP", {"tooltip": "Shared or local, whatever the model is."}),
                "vae": ("VAE", {"tooltip": "Passed on."}),
                "positive": ("STRING", prompt | {"tooltip": "What is wanted; may hold <lora:name:weight> tags."}),
                "negative": ("STRING", prompt | {"tooltip": "What is not wanted. LoRA tags count here, too."}),
                "clip_skip": (
                    "INT",
                    {
                        "default": 0, "min": 0, "max": 24,
                        "tooltip": "Stop so many layers before the text encoder's end, as CLIPSetLastLayer does with "
                        "the number below zero. 0 leaves it to the model.",
                    },
                ),
                "width": ("INT", side | {"tooltip": "Of the picture, in pixels."}),
                "height": ("INT", side | {"tooltip": "Of the picture, in pixels."}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 4096, "tooltip": "Pictures at once."}),
            },
            "optional": {
                "lora_stack": ("LORA_STACK", {"tooltip": "LoRAs from a Luna LoRA Stack or another pack's."}),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, unique_id: str = "", **_: Any) -> int:  # noqa: N802 - ComfyUI's name
        return _witness.turn(unique_id)

    def configure(
        self,
        model: Any,
        clip: Any,
        vae: Any,
        positive: str,
        negative: str,
        clip_skip: int,
        width: int,
        height: int,
        batch_size: int,
        lora_stack: Any = None,
        unique_id: str = "",
    ) -> tuple[Any, ...]:
        """Raises ValueError for what cannot be used, LoraMismatchError for a LoRA that does not fit."""
        _check(model, clip)
        texts = [lora_tags.parse(text) for text in (positive, negative)]
        planned = _plan(lora_stack, texts, unique_id)
        complaints = [complaint for text in texts for complaint in text.complaints] + planned.doubts
        _say(planned, complaints)
        latent = latents.empty(model.get_model_object("latent_format"), vae, width, height, batch_size)
        with_model, with_clip, applied = _apply(model, clip, planned)
        if clip_skip > 0:
            with_clip = with_clip.clone()
            with_clip.clip_layer(-clip_skip)
        conditionings = [with_clip.encode_from_tokens_scheduled(with_clip.tokenize(text.text)) for text in texts]
        metadata = {
            "positive": texts[0].text,
            "negative": texts[1].text,
            "clip_skip": clip_skip,
            "width": width,
            "height": height,
            "batch_size": batch_size,
            "loras": [dataclasses.asdict(lora) for lora in applied],
            "not_found": planned.missing,
            "warnings": complaints,
            "origins": {"model": str(origin_of(model)), "clip": str(origin_of(clip)), "vae": str(origin_of(vae))},
        }
        stack = [(lora.file, lora.model_strength, lora.clip_strength) for lora in applied if not lora.idle]
        clean = [text.text for text in texts]
        in_words = json.dumps(metadata, ensure_ascii=False, indent=2)
        return (with_model, with_clip, vae, *conditionings, latent, *clean, stack, in_words)


def _check(model: Any, clip: Any) -> None:
    if model is None:
        raise ValueError(f"{_NAME} the input model is None; connect a model that was loaded")
    if clip is None:
        raise ValueError(
            f"{_NAME} the input clip is None. If it is from a checkpoint loader, the checkpoint has no text encoder: "
            "load one with CLIPLoader, or as clip_1 of the Luna Model Router"
        )


def _plan(stack: Any, texts: list[lora_tags.TaggedText], node: str) -> Plan:
    tags = [entry for text in texts for entry in text.loras]
    try:
        entries = lora_stack.read(stack)
        for entry in (*entries, *tags):
            entry.check()
    except ValueError as exc:
        raise ValueError(f"{_NAME} {exc}") from exc
    _witness.saw(node, [entry.name for entry in (*entries, *tags)])
    return plan(entries, tags, lora_files.find)


def _say(planned: Plan, complaints: list[str]) -> None:
    for conflict in planned.conflicts:
        log.info("%s %s", _NAME, conflict)
    for complaint in complaints:
        log.warning("%s Warning: %s", _NAME, complaint)
    for name in planned.missing:
        log.warning("%s Warning: LoRA '%s' not found, skipped", _NAME, name)


def _apply(model: Any, clip: Any, planned: Plan) -> tuple[Any, Any, list[AppliedLora]]:
    applied: list[AppliedLora] = []
    for file, asked in planned.loras.items():
        model, clip, lora = lora_applying.apply(model, clip, file, asked)
        applied.append(lora)
        log.info("%s %s", _NAME, lora.line(size=sum(not each.idle for each in applied)))
    return model, clip, applied
