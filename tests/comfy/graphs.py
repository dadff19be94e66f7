"""Workflows beyond the benchmarks': the stock nodes that patch, hook or merge weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.workflows import Graph, txt2img_checkpoint


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def hook_lora(keyframes: bool = False, loras: Sequence[tuple[str, float, float]] = ()) -> Graph:
    """A LoRA that is scheduled by hooks on model and CLIP, for the positive prompt only; ``loras`` are below it."""
    graph = txt2img_checkpoint("sd15-tiny.safetensors", steps=4, loras=loras)
    hooks = ["hook", 0]
    graph["hook"] = _node(
        "CreateHookLora", lora_name="a.safetensors", strength_model=1.0, strength_clip=0.8
    )  # fmt: skip
    if keyframes:
        graph["first"] = _node("CreateHookKeyframe", strength_mult=0.0, start_percent=0.0)
        graph["second"] = _node("CreateHookKeyframe", strength_mult=1.0, start_percent=0.5, prev_hook_kf=["first", 0])
        graph["keyed"] = _node("SetHookKeyframes", hooks=hooks, hook_kf=["second", 0])
        hooks = ["keyed", 0]
    graph["hooked"] = _node(
        "SetClipHooks", clip=graph["positive"]["inputs"]["clip"], apply_to_conds=True, schedule_clip=False, hooks=hooks
    )
    graph["positive"]["inputs"]["clip"] = ["hooked", 0]
    return graph


def model_merge(ratio: float = 0.4) -> Graph:
    """The checkpoint merged with itself under a LoRA: every layer of the model is patched."""
    graph = txt2img_checkpoint("sd15-tiny.safetensors", loras=[("a.safetensors", 1.0, 0.0)])
    graph["merge"] = _node(
        "ModelMergeSimple", model1=["checkpoint", 0], model2=graph["sampler"]["inputs"]["model"], ratio=ratio
    )
    graph["sampler"]["inputs"]["model"] = ["merge", 0]
    return graph


def clip_merge(ratio: float = 0.3) -> Graph:
    """The text encoder merged with itself under two LoRAs."""
    loras = [("a.safetensors", 0.0, 1.0), ("b.safetensors", 0.0, 0.8)]
    graph = txt2img_checkpoint("sd15-tiny.safetensors", loras=loras)
    clip = graph["positive"]["inputs"]["clip"]
    graph["merge"] = _node("CLIPMergeSimple", clip1=["checkpoint", 1], clip2=clip, ratio=ratio)
    for prompt in ("positive", "negative"):
        graph[prompt]["inputs"]["clip"] = ["merge", 0]
    return graph


def clip_skip() -> Graph:
    graph = txt2img_checkpoint("sd15-tiny.safetensors")
    graph["skip"] = _node("CLIPSetLastLayer", clip=["checkpoint", 1], stop_at_clip_layer=-2)
    for prompt in ("positive", "negative"):
        graph[prompt]["inputs"]["clip"] = ["skip", 0]
    return graph


def dual_clip(first: str, second: str) -> Graph:
    """SDXL's two text encoders, loaded and nothing else."""
    return {
        "clip": _node("DualCLIPLoader", clip_name1=first, clip_name2=second, type="sdxl"),
        "end": _node("PreviewAny", source=["clip", 0]),
    }
