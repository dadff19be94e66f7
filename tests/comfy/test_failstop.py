"""Weights that die with their host (cuda-ipc): no picture is ever made of them, and the next prompt works."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.comfy_api import PromptFailed
from bench.comfy_server import ComfyServer
from bench.workflows import Graph, txt2img_checkpoint
from tests.comfy.conftest import KEEP_MODELS, ROOT, Host, running_host
from tests.comfy.test_lifecycle import until
from tests.tiers import comfy_checkout

pytestmark = pytest.mark.comfy

SD15 = "sd15-tiny.safetensors"
STEPS = 4


@pytest.fixture
def own_host(models: Path, tmp_path: Path) -> Iterator[Host]:
    with running_host(tmp_path, [models]) as host:
        yield host


@pytest.fixture
def server(models: Path, own_host: Host) -> Iterator[ComfyServer]:
    nodes = {"lunashm": ROOT / "comfy_ext", "failstop": ROOT / "tests" / "comfy" / "packs" / "failstop"}
    with ComfyServer(
        comfy=comfy_checkout(), models=[models], custom_nodes=nodes, environment=own_host.environment,
        arguments=KEEP_MODELS,
    ) as running:  # fmt: skip
        yield running


def killing(host: Host, step: int, after: bool, seed: int) -> Graph:
    graph = txt2img_checkpoint(SD15, steps=STEPS, seed=seed)
    graph["kill"] = {
        "class_type": "KillHostAtStep",
        "inputs": {"model": ["checkpoint", 0], "pid": host.pid, "step": step, "after": after},
    }
    graph["sampler"]["inputs"]["model"] = ["kill", 0]
    return graph


@pytest.mark.parametrize(("step", "after"), [(1, False), (2, False), (STEPS, True)], ids=["start", "between", "end"])
def test_host_that_dies_under_a_prompt_fails_it_and_the_next_one_loads_locally(
    server: ComfyServer, own_host: Host, stock: ComfyServer, step: int, after: bool
) -> None:
    """At the end: the last step's result is thrown away too, and the sampler's node keeps nothing of it."""
    server.render(txt2img_checkpoint(SD15))
    with pytest.raises(PromptFailed, match=r"the host \(pid \d+\) died.*not to be trusted"):
        server.render(killing(own_host, step, after, seed=10 + step))
    again = txt2img_checkpoint(SD15, seed=10 + step, steps=STEPS)
    assert server.render(again) == stock.render(again)
    log = server.log_text()
    assert "the host that held its weights is gone: freeing models after the current prompt" in log
    assert f"{SD15} is loaded locally" in log


def test_the_next_prompt_attaches_to_the_next_host(server: ComfyServer, own_host: Host, stock: ComfyServer) -> None:
    with pytest.raises(PromptFailed, match="not to be trusted"):
        server.render(killing(own_host, 2, after=False, seed=1))
    own_host.start()
    again = txt2img_checkpoint(SD15, seed=1)
    assert server.render(again) == stock.render(again)
    assert [(model["name"], model["clients"]) for model in own_host.models()] == [(SD15, 1)]


def test_host_that_dies_between_prompts_costs_no_prompt(
    server: ComfyServer, own_host: Host, stock: ComfyServer
) -> None:
    server.render(txt2img_checkpoint(SD15))
    own_host.kill()
    until(lambda: "the host that held its weights is gone" in server.log_text())
    other = txt2img_checkpoint(SD15, seed=2)
    assert server.render(other) == stock.render(other)


def test_model_that_is_still_there_waits_for_the_next_host(server: ComfyServer, own_host: Host) -> None:
    """A model that ComfyUI kept takes the same bytes from the next host before it runs."""
    graph = txt2img_checkpoint(SD15, steps=2)
    server.render(graph)
    own_host.kill()
    own_host.start()
    until(lambda: "the host that held its weights is gone" in server.log_text())
    server.render(txt2img_checkpoint(SD15, seed=3))
    assert [model["name"] for model in own_host.models()] == [SD15]
