"""One picture as two graphs: by stock nodes, and by Luna Model Router and Luna Config Gateway.

Owns which node has which inputs; knows no server and no file. Both graphs of a picture sample with the same node of the
same name, so that bench.workflows.again() renews either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.workflows import Graph, Link, Lora, txt2img_checkpoint

POSITIVE, NEGATIVE = "a lighthouse on a cliff, morning light", "blurry"
_PLACES = 5  # of a Luna LoRA Stack


@dataclass(frozen=True)
class Picture:
    """What is drawn. ``loras``: file, model strength, text encoder strength."""

    name: str
    side: int
    steps: int
    seed: int = 1
    loras: Sequence[Lora] = ()


def stock(picture: Picture) -> Graph:
    """CheckpointLoaderSimple, LoraLoaders, CLIPTextEncode."""
    return txt2img_checkpoint(
        picture.name, positive=POSITIVE, negative=NEGATIVE, seed=picture.seed, steps=picture.steps, size=picture.side,
        loras=picture.loras,
    )  # fmt: skip


def luna(
    picture: Picture, *, mode: str = "auto", clip_mode: str | None = None, stacked: bool = False, missing: str = ""
) -> Graph:
    """The same by Luna nodes; ``status`` and ``metadata`` are shown as text.

    ``clip_mode``: of a second Router, whose CLIP is used. ``stacked``: LoRAs by Luna LoRA Stack, else by tags in the
    prompt, each as asked for without its extension. ``missing``: a LoRA that is not there, asked for before the others.
    """
    graph: Graph = {"router": router(picture.name, mode)}
    clip: Link = ["router", 1]
    if clip_mode is not None:
        graph["clip_router"] = router(picture.name, clip_mode)
        graph["clip_status"] = shown(["clip_router", 4])
        clip = ["clip_router", 1]
    tags = [f"<lora:{missing}:0.7>"] if missing else []
    stack: dict[str, Any] = {}
    if stacked:
        stack = {"lora_stack": _stack(graph, picture.loras)}
    else:
        tags += [f"<lora:{name.removesuffix('.safetensors')}:{model}:{text}>" for name, model, text in picture.loras]
    graph["gateway"] = _node(
        "LunaConfigGateway", model=["router", 0], clip=clip, vae=["router", 2], positive=POSITIVE + "".join(tags),
        negative=NEGATIVE, clip_skip=0, width=picture.side, height=picture.side, batch_size=1, **stack,
    )  # fmt: skip
    links = {"model": ["gateway", 0], "positive": ["gateway", 3], "negative": ["gateway", 4]}
    settings = stock(picture)["sampler"]["inputs"] | links | {"latent_image": ["gateway", 5]}
    graph["sampler"] = _node("KSampler", **settings)
    graph["decode"] = _node("VAEDecode", samples=["sampler", 0], vae=["gateway", 2])
    graph["save"] = _node("SaveImage", images=["decode", 0], filename_prefix="bench")
    return graph | {"status": shown(["router", 4]), "metadata": shown(["gateway", 9])}


def router(name: str, mode: str = "auto", source: str = "checkpoints", **parts: str) -> dict[str, Any]:
    """``parts``: clip_1 and vae_name, for a source that brings none."""
    return _node(
        "LunaModelRouter", model_source=source, model_name=name, model_type="auto", precision="auto",
        daemon_mode=mode, **parts,
    )  # fmt: skip


def routed(picture: Picture, mode: str = "auto") -> Graph:
    """The stock graph with a Router in place of its loader; it has no LoRA tags and no stack."""
    return stock(picture) | {"checkpoint": router(picture.name, mode)}


def loaded(name: str, mode: str = "auto") -> Graph:
    """A Router, and nothing drawn."""
    return {"router": router(name, mode), "status": shown(["router", 4])}


def loaded_by_stock(name: str) -> Graph:
    """CheckpointLoaderSimple, and nothing drawn."""
    return {
        "checkpoint": _node("CheckpointLoaderSimple", ckpt_name=name),
        "shown": shown(["checkpoint", 0]),
    }


def from_parts(parts: dict[str, str], picture: Picture, mode: str | None = None) -> Graph:
    """A picture of a model in three files: by stock's three loaders, or by a Router with ``mode``."""
    graph = stock(picture)
    unet, clip, vae = (parts[kind] for kind in ("diffusion_models", "text_encoders", "vae"))
    if mode is None:
        del graph["checkpoint"]
        graph["unet"] = _node("UNETLoader", unet_name=unet, weight_dtype="default")
        graph["clip"] = _node("CLIPLoader", clip_name=clip, type="stable_diffusion")
        graph["vae"] = _node("VAELoader", vae_name=vae)
        graph["sampler"]["inputs"]["model"] = ["unet", 0]
        graph["decode"]["inputs"]["vae"] = ["vae", 0]
        for prompt in ("positive", "negative"):
            graph[prompt]["inputs"]["clip"] = ["clip", 0]
    else:
        graph["checkpoint"] = router(unet, mode, "diffusion_models", clip_1=clip, vae_name=vae)
    return graph


def shown(link: Link) -> dict[str, Any]:
    return _node("PreviewAny", source=link)


def _stack(graph: Graph, loras: Sequence[Lora]) -> Link:
    """Luna LoRA Stacks, chained where one has too few places."""
    before: dict[str, Any] = {}
    node = "stack0"
    for number, first in enumerate(range(0, max(len(loras), 1), _PLACES)):
        node, chosen = f"stack{number}", {}
        for place, (name, model, text) in enumerate(loras[first : first + _PLACES], 1):
            chosen |= {f"lora_{place}": name, f"model_strength_{place}": model, f"clip_strength_{place}": text}
        graph[node] = _node("LunaLoRAStack", **before, **chosen)
        before = {"lora_stack": [node, 0]}
    return [node, 0]


def _node(kind: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}
