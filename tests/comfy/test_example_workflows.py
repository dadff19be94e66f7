"""The example workflows: in step with the nodes, taken by ComfyUI's template browser, and they draw what they say."""

from __future__ import annotations

import io
import json
import urllib.parse
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.comfy_server import ComfyServer
from bench.pack import api, examples
from bench.pack.__main__ import PACK, written
from bench.pack.definitions import Definition, definitions
from bench.pack.pictures import MOST_NBYTES
from bench.workflows import Graph, pixels
from tests.comfy.luna import SD15

pytestmark = pytest.mark.comfy

FOLDER = PACK / "example_workflows"
TINY = {
    examples.MODEL: SD15,
    examples.REFINER: SD15,
    examples.CHARACTER: "a.safetensors",
    examples.STYLE: "b.safetensors",
}
SMALL = {"width": 64, "height": 64}


@pytest.fixture(scope="module")
def known(shared: ComfyServer) -> dict[str, Definition]:
    return definitions(json.loads(shared.request("/object_info")))


def saved(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return workflow


def small(graph: Graph) -> Graph:
    """With the files that the tests have, and little to compute."""
    for node in graph.values():
        inputs = node["inputs"]
        inputs |= {name: value for name, value in SMALL.items() if name in inputs}
        if "steps" in inputs:
            inputs["steps"] = min(inputs["steps"], 3)
        for name, value in inputs.items():
            if isinstance(value, str):
                inputs[name] = TINY.get(value, value).replace("<lora:character:", "<lora:a:")
    return graph


def drawn(server: ComfyServer, graph: Graph) -> dict[str, np.ndarray]:
    """What each SaveImage node saved, by its prefix."""
    entry = server.run(graph)
    found = {}
    for name, node in graph.items():
        if node["class_type"] == "SaveImage":
            (image,) = entry["outputs"][name]["images"]
            png = server.request("/view?" + urllib.parse.urlencode(image))
            found[node["inputs"]["filename_prefix"].removeprefix("luna/")] = pixels(png)
    return found


class Rendered:
    """What each example draws and what the log says meanwhile; each is run once."""

    def __init__(self, server: ComfyServer, known: Mapping[str, Definition]) -> None:
        self._server, self._known = server, known
        self._done: dict[str, tuple[dict[str, np.ndarray], str]] = {}

    def __getitem__(self, name: str) -> tuple[dict[str, np.ndarray], str]:
        if name not in self._done:
            before = len(self._server.log_text())
            pictures = drawn(self._server, small(api.prompt(saved(name), self._known)))
            self._done[name] = pictures, self._server.log_text()[before:]
        return self._done[name]


@pytest.fixture(scope="module")
def rendered(shared: ComfyServer, known: dict[str, Definition]) -> Rendered:
    return Rendered(shared, known)


def test_files_are_what_the_nodes_make_of_them_now(known: dict[str, Definition]) -> None:
    expected = {f"{name}.json": written(workflow) for name, workflow in examples.saved(known).items()}
    found = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    assert found == expected, "run: python -m bench.pack --pictures"


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_each_has_a_picture_that_the_template_browser_finds(shared: ComfyServer, name: str) -> None:
    listed = json.loads(shared.request("/workflow_templates"))["lunashm"]
    assert name in listed
    quoted = urllib.parse.quote(name)
    picture = shared.request(f"/api/workflow_templates/lunashm/{quoted}.jpg")
    assert len(picture) <= MOST_NBYTES
    with Image.open(io.BytesIO(picture)) as image:
        assert image.width >= 1000
    assert json.loads(shared.request(f"/api/workflow_templates/lunashm/{quoted}.json")) == saved(name)


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_no_nodes_overlap(name: str) -> None:
    boxes = [(*node["pos"], *node["size"]) for node in saved(name)["nodes"]]
    for index, (left, top, width, height) in enumerate(boxes):
        for x, y, w, h in boxes[index + 1 :]:
            assert x >= left + width or left >= x + w or y >= top + height + 30 or top >= y + h + 30


@pytest.mark.parametrize("name", examples.EXAMPLES)
def test_each_draws(rendered: Rendered, name: str) -> None:
    pictures, log = rendered[name]
    assert len(pictures) == sum(node["type"] == "SaveImage" for node in saved(name)["nodes"])
    assert all(picture.shape == (64, 64, 3) for picture in pictures.values())
    assert "] ⚠ " not in log, "a part is local that was to be shared"


def test_t3_applies_both_loras(rendered: Rendered) -> None:
    _, log = rendered["T3 A stack of two LoRAs"]
    assert "LoRA 'a.safetensors' -> MODEL shared (0.8), CLIP shared (0.8); stack size 1" in log
    assert "LoRA 'b.safetensors' -> MODEL shared (0.9), CLIP shared (0.9); stack size 2" in log


def test_t4_draws_the_same_in_all_four_combinations(rendered: Rendered) -> None:
    pictures, log = rendered["T4 Shared and local mixed"]
    for model in ("shared", "local"):
        for clip in ("shared", "local"):
            assert f"-> MODEL {model} (0.8), CLIP {clip} (0.8)" in log
    first, *others = (picture.astype(int) for picture in pictures.values())
    assert all(abs(other - first).max() <= 2 for other in others)


def test_t6_names_the_lora_that_is_missing_and_goes_on(rendered: Rendered) -> None:
    _, log = rendered["T6 When something is missing"]
    assert "[LunaConfigGateway] Warning: LoRA 'nonexistent' not found, skipped" in log


def test_t8_effect_grows_with_the_strength(rendered: Rendered) -> None:
    pictures, _ = rendered["T8 LoRA strengths"]
    plain = pictures["T8 strength 0"].astype(int)
    effects = [abs(pictures[f"T8 {title}"].astype(int) - plain).mean() for title in ("strength 0.5", "strength 1")]
    assert 0 < effects[0] < effects[1]
    assert (pictures["T8 two stacked"] != pictures["T8 strength 1"]).any()
