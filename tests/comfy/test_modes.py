"""auto, force_daemon, force_local; what is loaded locally is loaded as ever, and one line says why (I5)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench.comfy_server import ComfyServer, PromptFailed
from bench.workflows import txt2img_checkpoint
from tests.comfy.conftest import running_host, shared_server

pytestmark = pytest.mark.comfy

SD15 = "sd15-tiny.safetensors"


class Configured:
    """A server whose lunashm.toml the test rewrites: the extension reads it for every load."""

    def __init__(self, server: ComfyServer, toml: Path) -> None:
        self.server = server
        self._toml = toml

    def mode(self, mode: str) -> None:
        self._toml.write_text(f'mode = "{mode}"\n')
        self.server.free()


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("modes")


@pytest.fixture(scope="module")
def configured(models: Path, runtime: Path) -> Iterator[Configured]:
    """No host runs at its endpoint unless a test starts one."""
    toml = runtime / "lunashm.toml"
    toml.write_text("")
    environment = {"LUNASHM_RUNTIME_DIR": str(runtime), "LUNASHM_CONFIG": str(toml)}
    with shared_server(models, environment) as server:
        yield Configured(server, toml)


def test_auto_without_a_host_loads_locally_and_says_why_once(configured: Configured, stock: ComfyServer) -> None:
    configured.mode("auto")
    assert configured.server.render(txt2img_checkpoint(SD15)) == stock.render(txt2img_checkpoint(SD15))
    configured.mode("auto")
    configured.server.render(txt2img_checkpoint(SD15, seed=2))
    said = [line for line in configured.server.log_text().splitlines() if "is loaded locally" in line]
    assert len(said) == 1
    assert SD15 in said[0] and "no lunashm host at" in said[0]


def test_force_daemon_without_a_host_fails_and_names_the_endpoint(configured: Configured, runtime: Path) -> None:
    configured.mode("force_daemon")
    with pytest.raises(PromptFailed) as failed:
        configured.server.render(txt2img_checkpoint(SD15, seed=3))
    assert f"ipc://{runtime}/cpu.sock" in failed.value.exception_message
    assert "lunashm serve" in failed.value.exception_message


def test_a_pickle_is_not_shared_and_force_daemon_says_so(configured: Configured, models: Path) -> None:
    pickle = models / "checkpoints" / "pickle.ckpt"
    torch.save({"state_dict": load_file(models / "checkpoints" / SD15)}, pickle)
    try:
        configured.mode("force_daemon")
        with pytest.raises(PromptFailed, match=r"pickle\.ckpt is no safetensors file"):
            configured.server.render(txt2img_checkpoint("pickle.ckpt"))
        configured.mode("auto")
        configured.server.render(txt2img_checkpoint("pickle.ckpt"))
        assert "pickle.ckpt is loaded locally" in configured.server.log_text()
    finally:
        pickle.unlink()


def test_force_local_never_asks(configured: Configured, runtime: Path, models: Path) -> None:
    with running_host(runtime, [models]) as host:
        configured.mode("force_local")
        configured.server.render(txt2img_checkpoint(SD15, seed=4))
        assert host.clients() == []


def test_a_file_outside_the_roots_is_loaded_locally_with_the_hosts_reason(
    configured: Configured, runtime: Path, stock: ComfyServer
) -> None:
    elsewhere = runtime / "elsewhere"
    elsewhere.mkdir()
    with running_host(runtime, [elsewhere]):
        configured.mode("auto")
        workflow = txt2img_checkpoint(SD15, seed=5)
        assert configured.server.render(workflow) == stock.render(workflow)
    assert "is outside the host's roots" in configured.server.log_text()


def test_a_load_for_comfyui_is_what_comfyui_attaches_to(configured: Configured, runtime: Path, models: Path) -> None:
    with running_host(runtime, [models]) as host:
        host.ask("load", str(models / "checkpoints" / SD15), "--for", "comfyui")
        configured.mode("auto")
        configured.server.render(txt2img_checkpoint(SD15, seed=7))
        assert [(model["name"], model["clients"]) for model in host.models()] == [(SD15, 1)]


def test_a_host_that_starts_later_is_found_without_a_restart(
    configured: Configured, runtime: Path, models: Path
) -> None:
    with running_host(runtime, [models]) as host:
        configured.mode("auto")
        configured.server.render(txt2img_checkpoint(SD15, seed=6))
        assert [client["info"]["kind"] for client in host.clients()] == ["comfyui"]
