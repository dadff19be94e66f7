"""What happens when something dies, or is told to let go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.comfy_server import ComfyServer
from bench.workflows import txt2img_checkpoint
from tests.comfy.conftest import Host, running_host, shared_server

pytestmark = pytest.mark.comfy

SD15 = "sd15-tiny.safetensors"


@pytest.fixture
def own_host(models: Path, tmp_path: Path) -> Iterator[Host]:
    with running_host(tmp_path, [models]) as host:
        yield host


@pytest.fixture
def server(models: Path, own_host: Host) -> Iterator[ComfyServer]:
    with shared_server(models, own_host.environment) as running:
        yield running


def until(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def test_killed_host_is_survived_and_the_next_one_is_used(
    server: ComfyServer, own_host: Host, stock: ComfyServer
) -> None:
    workflows = [txt2img_checkpoint(SD15, seed=seed, loras=[("a.safetensors", 0.5, 0.5)]) for seed in (1, 2, 3)]
    assert server.render(workflows[0]) == stock.render(workflows[0])
    own_host.kill()
    assert server.render(workflows[1]) == stock.render(workflows[1]), "mapped weights outlive the host"
    own_host.start()
    assert server.render(workflows[2]) == stock.render(workflows[2])
    assert f"re-attached {SD15}" in server.log_text()
    assert [(model["name"], model["clients"]) for model in own_host.models()] == [(SD15, 1)]


def test_killed_comfyui_leaves_no_lease(server: ComfyServer, own_host: Host) -> None:
    server.render(txt2img_checkpoint(SD15))
    server.kill()
    until(lambda: own_host.clients() == [], seconds=5)


def test_unload_is_refused_while_in_use_and_forced_unload_frees_when_comfyui_lets_go(
    server: ComfyServer, own_host: Host
) -> None:
    server.render(txt2img_checkpoint(SD15))
    refused = own_host.ask("unload", SD15)["error"]
    assert refused["code"] == "model_in_use"
    assert f"ComfyUI :{server.port}" in refused["message"]
    own_host.ask("unload", SD15, "--force")
    until(lambda: own_host.models() == [])
    server.render(txt2img_checkpoint(SD15, seed=2))
    assert own_host.models() != []
