"""The example workflows: the eight set-ups of the testing guide, and a second model. What each is for is its note."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from bench.pack.definitions import Definition
from bench.pack.graph import Cell, Graph, Link, Node
from bench.pack.notes import NOTES

MODEL, REFINER = "sd_xl_base_1.0.safetensors", "sd_xl_refiner_1.0.safetensors"
CHARACTER, STYLE = "character.safetensors", "style.safetensors"
POSITIVE, NEGATIVE = "a lighthouse on a cliff, morning light", "blurry"

Draw = Callable[[Graph], None]


def saved(definitions: Mapping[str, Definition]) -> dict[str, dict[str, Any]]:
    """File name without suffix -> the workflow."""
    found = {}
    for name, draw in EXAMPLES.items():
        graph = Graph(name, definitions)
        draw(graph)
        found[name] = graph.saved()
    return found


# -- what they have in common ------------------------------------------------------------------------------------------


def _note(graph: Graph, key: str, cell: Cell = (0, 0), height: int = 420) -> None:
    graph.note(cell, NOTES[key], height=height)


def _router(graph: Graph, cell: Cell, **inputs: object) -> Node:
    return graph.node("LunaModelRouter", cell, **{"model_name": MODEL} | inputs)


def _sampler(graph: Graph, cell: Cell, **inputs: object) -> Node:
    settings = {"seed": 1, "steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal"}
    return graph.node("KSampler", cell, **settings | inputs)


def _gateway(graph: Graph, cell: Cell, model: Link, clip: Link, vae: Link, **inputs: object) -> Node:
    texts = {"positive": POSITIVE, "negative": NEGATIVE, "width": 1024, "height": 1024}
    return graph.node("LunaConfigGateway", cell, model=model, clip=clip, vae=vae, **texts | inputs)


def _sample_of(graph: Graph, cell: Cell, gateway: Node, **inputs: object) -> Node:
    links = {name: gateway[name] for name in ("model", "positive", "negative")}
    return _sampler(graph, cell, latent_image=gateway["latent"], **links, **inputs)


def _picture(graph: Graph, cell: Cell, samples: Link, vae: Link, prefix: str) -> None:
    """Decoded below the sampler, in ``cell``; saved in the column beside it."""
    decoded = graph.node("VAEDecode", cell, samples=samples, vae=vae)
    column, row = cell
    graph.node("SaveImage", (column + 1, row), images=decoded["image"], filename_prefix=f"luna/{prefix}")


def _drawn(graph: Graph, column: int, row: int, gateway: Node, prefix: str, **inputs: object) -> None:
    """Sampler and picture, in the two columns beside the gateway's."""
    sampler = _sample_of(graph, (column, row), gateway, **inputs)
    _picture(graph, (column, row), sampler["latent"], gateway["vae"], prefix)


def _shown(graph: Graph, cell: Cell, text: Link, title: str) -> None:
    graph.node("PreviewAny", cell, source=text).named(title)


def _stack(graph: Graph, cell: Cell, *loras: tuple[str, float]) -> Node:
    inputs: dict[str, Any] = {}
    for number, (name, strength) in enumerate(loras, 1):
        inputs |= {f"lora_{number}": name, f"model_strength_{number}": strength, f"clip_strength_{number}": strength}
    return graph.node("LunaLoRAStack", cell, **inputs)


# -- the set-ups -------------------------------------------------------------------------------------------------------


def _load(graph: Graph) -> None:
    _note(graph, "T1")
    router = _router(graph, (1, 0))
    positive = graph.node("CLIPTextEncode", (2, 0), clip=router["clip"], text=POSITIVE).named("positive prompt")
    negative = graph.node("CLIPTextEncode", (2, 0), clip=router["clip"], text=NEGATIVE).named("negative prompt")
    latent = graph.node("EmptyLatentImage", (2, 0), width=1024, height=1024)
    sampler = _sampler(
        graph, (3, 0), model=router["model"], positive=positive["conditioning"], negative=negative["conditioning"],
        latent_image=latent["latent"],
    )  # fmt: skip
    _picture(graph, (3, 0), sampler["latent"], router["vae"], "T1")
    _shown(graph, (4, 0), router["status"], "where each part comes from")


def _memory(graph: Graph) -> None:
    _note(graph, "T2")
    router = _router(graph, (1, 0))
    gateway = _gateway(graph, (2, 0), router["model"], router["clip"], router["vae"])
    sampler = _sample_of(graph, (3, 0), gateway, steps=5)
    _picture(graph, (3, 0), sampler["latent"], gateway["vae"], "T2")
    status = graph.node("LunaHostStatus", (3, 0), model=router["model"])
    _shown(graph, (4, 0), status["text"], "what the host holds, and for whom")


def _two_loras(graph: Graph) -> None:
    _note(graph, "T3")
    stack = _stack(graph, (1, 0), (CHARACTER, 0.8), (STYLE, 0.9))
    validator = graph.node("LunaLoRAValidator", (1, 0), lora_stack=stack["lora_stack"])
    router = _router(graph, (2, 0))
    _shown(graph, (2, 0), validator["report"], "which files are meant")
    gateway = _gateway(graph, (3, 0), router["model"], router["clip"], router["vae"], lora_stack=stack["lora_stack"])
    _drawn(graph, 4, 0, gateway, "T3")
    _shown(graph, (5, 0), gateway["metadata"], "what was applied")


def _mixed(graph: Graph) -> None:
    _note(graph, "T4")
    stack = _stack(graph, (0, 1), (STYLE, 0.8))
    routers = {
        "shared": _router(graph, (1, 0), daemon_mode="auto").named("Luna Model Router: shared"),
        "local": _router(graph, (1, 1), daemon_mode="force_local").named("Luna Model Router: local"),
    }
    for column, model in enumerate(routers):
        for row, clip in enumerate(routers):
            first = 2 + 3 * column
            gateway = _gateway(
                graph, (first, row), routers[model]["model"], routers[clip]["clip"], routers[model]["vae"],
                lora_stack=stack["lora_stack"],
            ).named(f"MODEL {model}, CLIP {clip}")  # fmt: skip
            _drawn(graph, first + 1, row, gateway, f"T4 MODEL {model} CLIP {clip}")


def _at_once(graph: Graph) -> None:
    _note(graph, "T5")
    router = _router(graph, (1, 0), daemon_mode="force_daemon")
    prompt = f"{POSITIVE} <lora:character:0.8>"
    gateway = _gateway(graph, (2, 0), router["model"], router["clip"], router["vae"], positive=prompt)
    _drawn(graph, 3, 0, gateway, "T5")
    _shown(graph, (4, 0), router["status"], "where each part comes from")


def _goes_wrong(graph: Graph) -> None:
    _note(graph, "T6", height=500)
    router = _router(graph, (1, 0))
    _shown(graph, (1, 0), router["status"], "where each part comes from, or why not")
    prompt = f"{POSITIVE} <lora:nonexistent:0.8>"
    gateway = _gateway(graph, (2, 0), router["model"], router["clip"], router["vae"], positive=prompt)
    _drawn(graph, 3, 0, gateway, "T6")
    validator = graph.node("LunaLoRAValidator", (3, 0), text=prompt)
    _shown(graph, (4, 0), validator["report"], "which LoRAs are there")


def _long_run(graph: Graph) -> None:
    _note(graph, "T7")
    router = _router(graph, (1, 0))
    gateway = _gateway(graph, (2, 0), router["model"], router["clip"], router["vae"])
    sampler = _sample_of(graph, (3, 0), gateway, steps=50, control_after_generate="increment")
    _picture(graph, (3, 0), sampler["latent"], gateway["vae"], "T7")
    status = graph.node("LunaHostStatus", (3, 0), model=router["model"])
    _shown(graph, (4, 0), status["text"], "what the host holds, and for whom")


def _strengths(graph: Graph) -> None:
    _note(graph, "T8")
    router = _router(graph, (0, 1))
    stacks = {
        "strength 0": [(STYLE, 0.0)],
        "strength 0.5": [(STYLE, 0.5)],
        "strength 1": [(STYLE, 1.0)],
        "two stacked": [(STYLE, 1.0), (CHARACTER, 0.8)],
    }
    for index, (title, loras) in enumerate(stacks.items()):
        column, row = 1 + 4 * (index // 2), index % 2
        stack = _stack(graph, (column, row), *loras).named(title)
        gateway = _gateway(
            graph, (column + 1, row), router["model"], router["clip"], router["vae"], lora_stack=stack["lora_stack"]
        )
        _drawn(graph, column + 2, row, gateway, f"T8 {title}")


def _second_model(graph: Graph) -> None:
    _note(graph, "second")
    first = _router(graph, (1, 0)).named("Luna Model Router: the first model")
    gateway = _gateway(graph, (2, 0), first["model"], first["clip"], first["vae"])
    base = _sample_of(graph, (3, 0), gateway)
    second = graph.node(
        "LunaSecondaryModelLoader", (4, 0), first_model=first["model"], model_name=REFINER, clip=first["clip"],
        vae=first["vae"],
    )  # fmt: skip
    again = _gateway(graph, (5, 0), second["model"], second["clip"], second["vae"])
    links = {name: again[name] for name in ("model", "positive", "negative")}
    refined = _sampler(graph, (6, 0), latent_image=base["latent"], denoise=0.25, **links)
    _shown(graph, (4, 0), second["status"], "what was loaded, and what was there")
    _picture(graph, (6, 0), refined["latent"], second["vae"], "second model")


EXAMPLES: dict[str, Draw] = {
    "T1 Load through the Router": _load,
    "T2 Memory of several ComfyUIs": _memory,
    "T3 A stack of two LoRAs": _two_loras,
    "T4 Shared and local mixed": _mixed,
    "T5 Several ComfyUIs at once": _at_once,
    "T6 When something is missing": _goes_wrong,
    "T7 Fifty steps": _long_run,
    "T8 LoRA strengths": _strengths,
    "A second model that refines": _second_model,
}
