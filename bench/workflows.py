"""ComfyUI workflows in API format, small enough for a CPU, and what to compare of their images.

Owns graphs of stock nodes; knows no server and no file. Same arguments, same graph: the PNG carries it as
metadata, so whole files can be compared byte for byte between servers.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Graph = dict[str, dict[str, Any]]
Lora = tuple[str, float, float]  # file name, strength_model, strength_clip
Link = list[str | int]  # node, output


def _node(kind: str, **inputs: object) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def _loras(graph: Graph, model: Link, clip: Link, loras: Sequence[Lora]) -> tuple[Link, Link]:
    """Chain stock LoraLoaders; returns where model and clip come from afterwards."""
    for index, (name, strength_model, strength_clip) in enumerate(loras):
        node = f"lora{index}"
        graph[node] = _node(
            "LoraLoader", model=model, clip=clip, lora_name=name, strength_model=strength_model,
            strength_clip=strength_clip,
        )  # fmt: skip
        model, clip = [node, 0], [node, 1]
    return model, clip


def _sample(
    graph: Graph,
    sources: tuple[Link, Link, Link],
    latent: dict[str, Any],
    prompts: tuple[str, str],
    **settings: object,
) -> Graph:
    """The common end of a text-to-image graph; `sources`: model, clip, vae; `settings`: the KSampler's."""
    model, clip, vae = sources
    graph["latent"] = latent
    graph["positive"] = _node("CLIPTextEncode", clip=clip, text=prompts[0])
    graph["negative"] = _node("CLIPTextEncode", clip=clip, text=prompts[1])
    links = {"positive": ["positive", 0], "negative": ["negative", 0], "latent_image": ["latent", 0]}
    graph["sampler"] = _node("KSampler", model=model, **links, **settings, denoise=1.0)
    graph["decode"] = _node("VAEDecode", samples=["sampler", 0], vae=vae)
    graph["save"] = _node("SaveImage", images=["decode", 0], filename_prefix="bench")
    return graph


def txt2img_checkpoint(
    ckpt: str,
    *,
    positive: str = "a lighthouse on a cliff, morning light",
    negative: str = "blurry",
    seed: int = 1,
    steps: int = 2,
    size: int = 64,
    sampler: str = "euler",
    scheduler: str = "normal",
    cfg: float = 4.0,
    loras: Sequence[Lora] = (),
    sd3: bool = False,
) -> Graph:
    """CheckpointLoaderSimple to SaveImage; `size` in pixels, a multiple of 16.

    `sd3` asks for the 16-channel latent that an SD3 checkpoint needs.
    """
    graph: Graph = {"checkpoint": _node("CheckpointLoaderSimple", ckpt_name=ckpt)}
    model, clip = _loras(graph, ["checkpoint", 0], ["checkpoint", 1], loras)
    kind = "EmptySD3LatentImage" if sd3 else "EmptyLatentImage"
    latent = _node(kind, width=size, height=size, batch_size=1)
    return _sample(
        graph, (model, clip, ["checkpoint", 2]), latent, (positive, negative),
        seed=seed, steps=steps, cfg=cfg, sampler_name=sampler, scheduler=scheduler,
    )  # fmt: skip


def flux_unet(
    unet: str,
    clip: str,
    vae: str,
    *,
    positive: str = "a lighthouse on a cliff, morning light",
    seed: int = 1,
    steps: int = 2,
    size: int = 64,
    sampler: str = "euler",
    scheduler: str = "simple",
    guidance: float = 3.5,
    loras: Sequence[Lora] = (),
    weight_dtype: str = "default",
) -> Graph:
    """UNETLoader + CLIPLoader (CLIP-L) + VAELoader for a Flux whose context is 768 wide.

    A published Flux takes its context from T5-XXL (4.7 B parameters, and no smaller one loads); flux-tiny of
    bench.checkpoints takes context and pooled vector from CLIP-L, through the stock "stable_diffusion" type.
    """
    graph: Graph = {
        "unet": _node("UNETLoader", unet_name=unet, weight_dtype=weight_dtype),
        "clip": _node("CLIPLoader", clip_name=clip, type="stable_diffusion"),
        "vae": _node("VAELoader", vae_name=vae),
    }
    model, text = _loras(graph, ["unet", 0], ["clip", 0], loras)
    latent = _node("EmptySD3LatentImage", width=size, height=size, batch_size=1)
    _sample(
        graph, (model, text, ["vae", 0]), latent, (positive, ""),
        seed=seed, steps=steps, cfg=1.0, sampler_name=sampler, scheduler=scheduler,
    )  # fmt: skip
    graph["guidance"] = _node("FluxGuidance", conditioning=["positive", 0], guidance=guidance)
    graph["sampler"]["inputs"]["positive"] = ["guidance", 0]
    return graph


def vae_only(vae: str, size: int = 64, color: int = 0x4080C0) -> Graph:
    """VAELoader alone: a plain image encoded and decoded again, for what a VAE costs by itself."""
    return {
        "vae": _node("VAELoader", vae_name=vae),
        "image": _node("EmptyImage", width=size, height=size, batch_size=1, color=color),
        "encode": _node("VAEEncode", pixels=["image", 0], vae=["vae", 0]),
        "decode": _node("VAEDecode", samples=["encode", 0], vae=["vae", 0]),
        "save": _node("SaveImage", images=["decode", 0], filename_prefix="bench"),
    }


def again(workflow: Graph, nonce: int) -> Graph:
    """The same workflow, sampled anew by a server that has it cached: same pixels, other metadata.

    An input that the node doesn't declare is part of ComfyUI's cache key, and is not passed on to the node.
    """
    renewed = copy.deepcopy(workflow)
    renewed["sampler"]["inputs"]["bench_nonce"] = nonce
    return renewed


def pixels(png: bytes) -> NDArray[np.uint8]:
    """(height, width, 3) of a PNG, without its metadata."""
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))
