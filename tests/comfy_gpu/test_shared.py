"""ComfyUI on a GPU with a host of its memory: the weights are used where they are, whatever ComfyUI's flags."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.comfy_server import PromptFailed
from bench.workflows import again, flux_unet, pixels, txt2img_checkpoint
from tests.comfy_gpu.conftest import Machine
from tests.cuda.conftest import GpuHost

pytestmark = pytest.mark.comfy_gpu

MB = 1_000_000
SD15 = txt2img_checkpoint("sd15-tiny.safetensors")
FLUX = flux_unet("flux-tiny.safetensors", "clip-l.safetensors", "vae-tiny.safetensors")
LENT = "npu:0 (lent)"
MODELS = ("BaseModel", "SD1ClipModel", "TAESD")
FLAGS = [(), ("--gpu-only",), ("--lowvram",), ("--disable-smart-memory",)]


def flat(name: str) -> str:
    return name or "no-flags"


@pytest.fixture(scope="module")
def pictures(shared_machine: Machine) -> dict[str, NDArray[np.uint8]]:
    """What stock ComfyUI draws on the same GPU without flags."""
    server = shared_machine.server(lunashm=False)
    found = {"sd15": pixels(server.render(SD15)), "flux": pixels(server.render(FLUX))}
    server.stop()
    return found


@pytest.fixture(scope="module")
def host(shared_machine: Machine, pictures: dict[str, NDArray[np.uint8]]) -> GpuHost:
    return shared_machine.host()


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flat("".join(flags)))
def test_weights_are_the_hosts_and_the_picture_is_stocks(
    shared_machine: Machine, host: GpuHost, pictures: dict[str, NDArray[np.uint8]], flags: tuple[str, ...]
) -> None:
    server = shared_machine.server(*flags)
    assert (pixels(server.render(SD15)) == pictures["sd15"]).all()
    for name, model in server.loaded().items():
        assert model["patcher"] == "SharedModelPatcher", name
        assert model["load_device"] == "npu:0", f"{name}: text encoders too are where their weights are"
        assert model["nbytes"][LENT] > 0.9 * sum(model["nbytes"].values()), (name, model)
        assert model["loaded_nbytes"] < 2 * MB, "what ComfyUI plans with is what unloading would give back"
    assert (pixels(server.render(FLUX)) == pictures["flux"]).all()
    server.stop()


def test_loading_takes_no_memory_of_the_gpu(shared_machine: Machine, host: GpuHost) -> None:
    """With --gpu-only stock builds every model on the GPU. One render first: what it computes with is counted, too."""
    server = shared_machine.server("--gpu-only")
    server.render(SD15)
    drawing = server.devices()[0]["allocated_peak"]
    server.free()
    server.reset()
    server.render(again(SD15, 1))
    facts = server.devices()[0]
    assert drawing < 100 * MB, "the text encoder alone has 246 MB"
    assert facts["allocated_peak"] <= drawing + 4 * MB
    assert facts["to_device_bytes"] < 20 * MB, "no weight was copied"
    server.stop()


def test_dynamic_vram_manages_no_shared_model(shared_machine: Machine, host: GpuHost) -> None:
    """ComfyUI's default on NVIDIA. Its native part needs a real driver; the classes it exchanges do not."""
    server = shared_machine.server(LUNASHM_TEST_DYNAMIC_VRAM="1")
    server.render(SD15)
    for name, model in server.loaded().items():
        assert model["patcher"] == "SharedModelPatcher", name
        assert model["nbytes"][LENT] > 0.9 * sum(model["nbytes"].values()), (name, model)
    server.stop()


def test_model_that_the_user_has_run_on_the_cpu_is_loaded_there(shared_machine: Machine, host: GpuHost) -> None:
    server = shared_machine.server("--cpu-vae")
    server.render(SD15)
    models = server.loaded()
    assert set(models["TAESD"]["tensors"]) == {"cpu"}
    assert models["BaseModel"]["nbytes"][LENT] > 0
    assert "TAESD is loaded locally: it runs on cpu, and the host lends memory of npu:0" in server.log_text()
    server.stop()


def test_free_memory_counts_the_weights_once(shared_machine: Machine, host: GpuHost) -> None:
    """They are the device's used bytes from the host's load on; a ComfyUI that attaches adds what it computes with."""
    first, second = shared_machine.server(), shared_machine.server()
    first.render(SD15)
    free = second.system_stats()["devices"][0]["vram_free"]
    second.render(again(SD15, 1))
    assert free - second.system_stats()["devices"][0]["vram_free"] < 50 * MB
    account = next(model for model in host.ask("ps", "--device", "cuda")["models"] if "sd15" in model["name"])
    assert account["clients"] == 2
    first.stop()
    second.stop()


def test_little_free_memory_unloads_nothing_that_would_not_help(machine: Machine) -> None:
    """A GPU that the weights fill but for what drawing takes: stock would have no room for them at all."""
    host = machine.host()
    checkpoint = str(machine.models / "checkpoints" / "sd15-tiny.safetensors")
    host.ask("load", checkpoint, "--for", "comfyui", "--device", "cuda")
    server = machine.server(LUNASHM_STANDIN_MEMORY=str(500 * MB))
    picture = pixels(server.render(SD15))
    assert (pixels(server.render(again(SD15, 1))) == picture).all()
    assert "loaded partially" not in server.log_text()
    assert all(LENT in model["nbytes"] for model in server.loaded().values())


def test_lora_is_applied_where_the_weights_are(shared_machine: Machine, host: GpuHost) -> None:
    loras = [("a.safetensors", 1.0, 1.0), ("b.safetensors", -0.5, 0.5)]
    graph = txt2img_checkpoint("sd15-tiny.safetensors", loras=loras)
    stock, server = shared_machine.server(lunashm=False), shared_machine.server()
    theirs, ours = pixels(stock.render(graph)).astype(int), pixels(server.render(graph)).astype(int)
    assert np.abs(theirs - ours).max() <= 16, "half precision, and another order of rounding"
    assert np.abs(theirs - ours).mean() < 1
    assert server.loaded()["BaseModel"]["nbytes"][LENT] > 40 * MB
    stock.stop()
    server.stop()


def test_host_of_another_gpu_is_refused_with_both_names(machine: Machine) -> None:
    host = machine.host("--device", "cuda:1")
    server = machine.server(LUNASHM_ENDPOINT=host.ready["endpoint"])
    server.render(SD15)
    assert "lends memory of cuda:1, Stand-in GPU 1" in server.log_text()
    assert "this ComfyUI runs on npu:0" in server.log_text()


def test_killed_host_is_replaced_between_prompts(machine: Machine) -> None:
    """cuda-vmm: what is mapped outlives it."""
    host = machine.host()
    server = machine.server()
    first = pixels(server.render(SD15))
    host.kill()
    assert (pixels(server.render(txt2img_checkpoint("sd15-tiny.safetensors", seed=7))) != first).any()
    machine.host()
    server.render(txt2img_checkpoint("sd15-tiny.safetensors", seed=8))
    server.render(txt2img_checkpoint("sd15-tiny.safetensors", seed=9))
    assert "re-attached sd15-tiny.safetensors" in server.log_text()
    assert server.loaded()["BaseModel"]["nbytes"][LENT] > 40 * MB


def test_weights_that_went_with_their_host_draw_nothing(machine: Machine) -> None:
    host = machine.host("--memory", "cuda-ipc")
    server = machine.server()
    server.render(SD15)
    assert server.loaded()["BaseModel"]["nbytes"][LENT] > 40 * MB, server.log_text()
    host.kill()
    with pytest.raises(PromptFailed, match="host"):
        server.render(txt2img_checkpoint("sd15-tiny.safetensors", seed=7))
    server.render(txt2img_checkpoint("sd15-tiny.safetensors", seed=8))
    assert "loaded locally" in server.log_text()
