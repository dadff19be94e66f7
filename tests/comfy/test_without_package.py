"""The pack in a ComfyUI whose Python has no lunashm that it can use: it says so, once, and everything else works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import lunashm
from bench.comfy_server import ComfyServer, PromptFailed
from bench.workflows import pixels, txt2img_checkpoint
from tests.comfy.conftest import KEEP_MODELS, ROOT
from tests.comfy.luna import SD15, drawn, routed, show
from tests.tiers import comfy_checkout

pytestmark = pytest.mark.comfy

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == {name!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def not_installed(place: Path) -> None:
    (place / "sitecustomize.py").write_text(BLOCKED.format(name="lunashm"))


def of_another_version(place: Path) -> None:
    (place / "lunashm").mkdir()
    (place / "lunashm" / "__init__.py").write_text('__version__ = "9.9.9"\n')


def without_what_it_needs(place: Path) -> None:
    (place / "sitecustomize.py").write_text(BLOCKED.format(name="zmq"))


REASONS = {
    not_installed: "the lunashm package is not installed in this Python, so models are loaded locally",
    of_another_version: f"this extension is version {lunashm.__version__} but the lunashm package is 9.9.9",
    without_what_it_needs: "the lunashm package is installed, but not what it needs (No module named 'zmq')",
}


@dataclass
class Alone:
    server: ComfyServer
    reason: str


@pytest.fixture(scope="module", params=REASONS, ids=lambda make: make.__name__)
def alone(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    """The pack is a copy, as ComfyUI-Manager makes it: nothing beside it helps it out."""
    place = tmp_path_factory.mktemp("python")
    request.param(place)
    pack = tmp_path_factory.mktemp("custom") / "lunashm"
    shutil.copytree(ROOT / "comfy_ext", pack, ignore=shutil.ignore_patterns("__pycache__"))
    environment = {"PYTHONPATH": str(place), "LUNASHM_RUNTIME_DIR": str(place)}
    with ComfyServer(
        comfy=comfy_checkout(), models=[models], custom_nodes={"lunashm": pack}, environment=environment,
        arguments=KEEP_MODELS,
    ) as server:  # fmt: skip
        yield Alone(server, REASONS[request.param])


only_once = pytest.mark.parametrize("alone", [not_installed], indirect=True, ids=lambda make: make.__name__)
"""For what draws, and differs by the reason alone."""


def test_nodes_are_listed_and_the_log_says_why_once(alone: Alone) -> None:
    listed = json.loads(alone.server.request("/object_info"))
    assert {kind for kind, node in listed.items() if node["python_module"] == "custom_nodes.lunashm"} >= {
        "LunaModelRouter", "LunaConfigGateway", "LunaLoRAStack", "LunaSecondaryModelLoader", "LunaHostStatus",
        "LunaLoRAValidator",
    }  # fmt: skip
    log = alone.server.log_text()
    assert log.count("[lunashm]") == log.count(f"[lunashm] {alone.reason}") == 1
    assert "Traceback" not in log


@only_once
def test_router_loads_locally_and_says_why(alone: Alone) -> None:
    picture, status = drawn(alone.server, routed(txt2img_checkpoint(SD15, seed=1)))
    assert (pixels(picture) == pixels(alone.server.render(txt2img_checkpoint(SD15, seed=1)))).all()
    *parts, mode = status.splitlines()
    assert [part.split(":")[0] for part in parts] == [f"{what} {SD15}" for what in ("MODEL", "CLIP", "VAE")]
    assert all(f": local: {alone.reason}" in part for part in parts)
    assert mode == "daemon_mode auto"
    assert f"[LunaModelRouter] ⚠ MODEL {SD15}: local: {alone.reason}" in alone.server.log_text()


def test_force_daemon_is_an_error_with_the_reason(alone: Alone) -> None:
    with pytest.raises(PromptFailed) as failed:
        alone.server.render(routed(txt2img_checkpoint(SD15, seed=2), daemon_mode="force_daemon"))
    assert "daemon_mode is 'force_daemon', so nothing is loaded locally: " in failed.value.exception_message
    assert alone.reason in failed.value.exception_message


@only_once
def test_gateway_applies_loras_to_what_is_local(alone: Alone) -> None:
    graph = routed(txt2img_checkpoint(SD15, seed=3))
    texts = {"positive": "a hill <lora:a:0.8> <lora:nonexistent:1>", "negative": "blurry"}
    size = {"clip_skip": 0, "width": 64, "height": 64, "batch_size": 1}
    parts = {name: ["checkpoint", index] for index, name in enumerate(("model", "clip", "vae"))}
    graph["gateway"] = {"class_type": "LunaConfigGateway", "inputs": parts | texts | size}
    links = {"model": ["gateway", 0], "positive": ["gateway", 3], "negative": ["gateway", 4]}
    graph["sampler"]["inputs"] |= links | {"latent_image": ["gateway", 5]}
    alone.server.render(graph)
    log = alone.server.log_text()
    assert "[LunaConfigGateway] LoRA 'a.safetensors' -> MODEL local (0.8), CLIP local (0.8); stack size 1" in log
    assert "[LunaConfigGateway] Warning: LoRA 'nonexistent' not found, skipped" in log


def test_host_status_says_that_there_is_none_and_why(alone: Alone) -> None:
    asked = {"asked": {"class_type": "LunaHostStatus", "inputs": {}}, "text": show(["asked", 0])}
    text = alone.server.run(asked)["outputs"]["text"]["text"][0]
    assert text.startswith(f"no host: {alone.reason}")
    assert "here: nothing is shared" in text
