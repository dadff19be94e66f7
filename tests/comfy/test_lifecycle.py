"""What happens when something dies, or is told to let go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.comfy_server import ComfyServer
from bench.workflows import pixels, txt2img_checkpoint
from tests.comfy.conftest import Host, running_host, shared_server
from tests.comfy.test_lora import ROUNDING

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


def same(ours: bytes, theirs: bytes) -> bool:
    """Within the rounding of LoRAs; see test_lora.py."""
    return bool(np.abs(pixels(ours).astype(int) - pixels(theirs)).max() <= ROUNDING)


def test_killed_host_is_survived_and_the_next_one_is_used(
    server: ComfyServer, own_host: Host, stock: ComfyServer
) -> None:
    lora = [("a.safetensors", 0.5, 0.5)]
    first, second = (txt2img_checkpoint(SD15, seed=seed, loras=lora) for seed in (1, 2))
    other_text = txt2img_checkpoint(SD15, positive="a harbour at night", loras=lora)
    assert same(server.render(first), stock.render(first))
    model = own_host.models()[0]
    own_host.kill()
    assert same(server.render(second), stock.render(second)), "mapped weights outlive the host"
    own_host.start()
    own_host.ask("load", model["path"], *(f"--dtype={prefix}={dtype}" for prefix, dtype in model["rules"]))
    # the text encoder runs first and is renewed first, while the UNet is still patched with the LoRA
    assert same(server.render(other_text), stock.render(other_text))
    assert server.log_text().count(f"re-attached {SD15}") == 3, "UNet, text encoder and VAE"
    assert [(model["name"], model["clients"]) for model in own_host.models()] == [(SD15, 1)]


def test_sealed_memory_without_a_name_draws_the_same_and_outlives_its_host(
    models: Path, tmp_path: Path, stock: ComfyServer
) -> None:
    """As in a container with a small /dev/shm."""
    first, second, third = (txt2img_checkpoint(SD15, seed=seed) for seed in (1, 2, 3))
    with running_host(tmp_path, [models], memory="memfd") as host, shared_server(models, host.environment) as server:
        assert server.render(first) == stock.render(first)
        model = host.models()[0]
        assert (model["rung"], model["clients"]) == ("memfd", 1)
        host.kill()
        assert server.render(second) == stock.render(second)
        host.start()
        host.ask("load", model["path"], *(f"--dtype={prefix}={dtype}" for prefix, dtype in model["rules"]))
        assert server.render(third) == stock.render(third)
        assert f"re-attached {SD15}" in server.log_text()


def test_model_that_comfyui_drops_for_want_of_ram_is_attached_again(
    models: Path, own_host: Host, stock: ComfyServer
) -> None:
    """ComfyUI's default cache, as on a machine that never has enough RAM."""
    with shared_server(models, own_host.environment, "--cache-ram", "1000", "1000") as server:
        for seed in (1, 2):
            graph = txt2img_checkpoint(SD15, seed=seed)
            assert server.render(graph) == stock.render(graph)
        assert server.log_text().count(f"attached {SD15}") == 2
        assert "loaded locally" not in server.log_text()


def test_a_prompt_does_not_wait_for_a_new_host_that_is_still_loading(server: ComfyServer, own_host: Host) -> None:
    server.render(txt2img_checkpoint(SD15))
    own_host.kill()
    own_host.start()
    server.render(txt2img_checkpoint(SD15, seed=2))
    assert f"{SD15} stays on the old copy for now" in server.log_text()
    until(lambda: [model["state"] for model in own_host.models()] == ["ready"])
    server.render(txt2img_checkpoint(SD15, seed=3))
    assert f"re-attached {SD15}" in server.log_text()


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
