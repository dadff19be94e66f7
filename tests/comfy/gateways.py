"""Graphs with the Luna nodes for LoRAs, beside the stock graphs that make the same picture, and what they show."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.comfy_server import ComfyServer
from bench.workflows import Graph, pixels, txt2img_checkpoint

PROMPT, NEGATIVE = "a lighthouse on a cliff, morning light", "blurry"  # of bench.workflows


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def gateway(graph: Graph, positive: str = PROMPT, negative: str = NEGATIVE, **inputs: Any) -> Graph:
    """A stock graph without LoRAs with the gateway in place of its encoders and its latent."""
    graph = copy.deepcopy(graph)
    sampler, decode = graph["sampler"]["inputs"], graph["decode"]["inputs"]
    size = graph.pop("latent")["inputs"]
    clip = graph.pop("positive")["inputs"]["clip"]
    del graph["negative"]
    sources = {"model": sampler["model"], "clip": clip, "vae": decode["vae"]}
    prompts = {"positive": positive, "negative": negative, "clip_skip": 0}
    graph["gateway"] = node("LunaConfigGateway", **(sources | prompts | size | inputs))
    conditioning = ["gateway", 3]
    if "guidance" in graph:
        graph["guidance"]["inputs"]["conditioning"], conditioning = conditioning, ["guidance", 0]
    sampler |= {
        "model": ["gateway", 0], "positive": conditioning, "negative": ["gateway", 4], "latent_image": ["gateway", 5]
    }  # fmt: skip
    decode["vae"] = ["gateway", 2]
    graph["stack_out"] = node("PreviewAny", source=["gateway", 8])
    graph["metadata"] = node("PreviewAny", source=["gateway", 9])
    return graph


def sd15(positive: str = PROMPT, negative: str = NEGATIVE, *, seed: int, **inputs: Any) -> Graph:
    return gateway(txt2img_checkpoint("sd15-tiny.safetensors", seed=seed), positive, negative, **inputs)


def with_stack(graph: Graph, stack: Any) -> Graph:
    """``stack``: what another pack's node gives."""
    graph["given"] = node("GivenStack", stack=json.dumps(stack))
    graph["gateway"]["inputs"]["lora_stack"] = ["given", 0]
    return graph


@dataclass(frozen=True)
class Drawn:
    """``lines``: of the server's log while it drew, those of the gateway."""

    image: NDArray[Any]
    metadata: dict[str, Any]
    stack: list[Any]
    lines: list[str]

    @property
    def loras(self) -> list[tuple[str, float, float]]:
        return [(lora["file"], lora["model_strength"], lora["clip_strength"]) for lora in self.metadata["loras"]]


def draw(server: ComfyServer, graph: Graph) -> Drawn:
    before = len(server.log_text())
    entry = server.run(graph)
    said = [line for line in server.log_text()[before:].splitlines() if "[LunaConfigGateway]" in line]
    metadata, stack = (json.loads(entry["outputs"][name]["text"][0]) for name in ("metadata", "stack_out"))
    return Drawn(pixels(server.image(entry)).astype(int), metadata, stack, said)


def distance(ours: NDArray[Any], theirs: NDArray[Any]) -> int:
    """In levels of 255."""
    return int(np.abs(ours.astype(int) - theirs.astype(int)).max())
