"""Stock ComfyUI on the stand-in GPU: what tests of lunashm there are compared with is itself right."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.comfy_server import ComfyServer, PromptFailed
from bench.workflows import Graph, again, flux_unet, pixels, txt2img_checkpoint
from tests.comfy_gpu.conftest import Machine, Server
from tests.tiers import comfy_checkout

pytestmark = pytest.mark.comfy_gpu

MB = 1_000_000
SD15 = txt2img_checkpoint("sd15-tiny.safetensors")
FLUX = flux_unet("flux-tiny.safetensors", "clip-l.safetensors", "vae-tiny.safetensors")
FP32 = ("--fp32-unet", "--fp32-vae", "--fp32-text-enc")
"""What ComfyUI computes with on a CPU; half precision is slow there, and the accelerator's kernels are the CPU's."""


def take_memory(nbytes: int) -> Graph:
    return {"take": {"class_type": "TakeMemory", "inputs": {"nbytes": nbytes}}}


def distance(left: NDArray[np.uint8], right: NDArray[np.uint8]) -> int:
    """The largest difference of a pixel, of 255."""
    return int(np.abs(left.astype(int) - right.astype(int)).max())


@pytest.fixture(scope="module")
def on_cpu(shared_machine: Machine) -> Iterator[ComfyServer]:
    """What its pictures are compared with."""
    with ComfyServer(comfy=comfy_checkout(), models=[shared_machine.models], arguments=FP32) as server:
        yield server


@pytest.fixture(scope="module")
def picture(on_cpu: ComfyServer) -> NDArray[np.uint8]:
    """What SD15 is on the CPU."""
    return pixels(on_cpu.render(SD15))


@pytest.fixture(scope="module")
def server(shared_machine: Machine) -> Server:
    return shared_machine.server(*FP32, lunashm=False)


@pytest.mark.parametrize("flags", [(), ("--highvram",), ("--lowvram",), ("--novram",), ("--gpu-only",)], ids=str)
def test_picture_is_the_cpus_however_memory_is_managed(
    machine: Machine, picture: NDArray[np.uint8], flags: tuple[str, ...]
) -> None:
    assert picture.std() > 1, "a flat image would prove nothing"
    server = machine.server(*FP32, *flags, lunashm=False)
    assert distance(pixels(server.render(SD15)), picture) <= 2
    assert "Device: npu" in server.log_text()
    assert "VAE load device: npu:0" in server.log_text()
    first, second = server.devices()
    assert first["to_device_bytes"] > 50 * MB, "the UNet at least was copied there"
    assert first["allocations"] > 1000
    assert second["allocations"] == 0


def test_picture_of_another_kind_of_model_is_the_cpus(server: Server, on_cpu: ComfyServer) -> None:
    expected = pixels(on_cpu.render(FLUX))
    assert expected.std() > 1
    assert distance(pixels(server.render(FLUX)), expected) <= 2


def test_models_weights_are_on_the_gpu_and_not_lent(server: Server) -> None:
    server.render(SD15)
    models = server.loaded()
    assert set(models["BaseModel"]["tensors"]) == {"npu:0"}, models
    assert models["BaseModel"]["load_device"] == "npu:0"


def test_half_precision_is_drawn_with_where_nothing_else_is_asked_for(machine: Machine) -> None:
    server = machine.server(lunashm=False)
    assert pixels(server.render(SD15)).std() > 1
    assert "model weight dtype torch.float16, manual cast: None" in server.log_text()


def test_unloading_gives_the_memory_back(server: Server) -> None:
    free = server.devices()[0]["free"]
    server.render(again(SD15, 1))
    assert server.devices()[0]["free"] < server.devices()[0]["total"] - 200 * MB
    server.free()
    assert server.devices()[0]["free"] >= free
    assert server.devices()[0]["allocated"] < 20 * MB


def test_running_out_of_memory_is_recognised_and_survived(server: Server) -> None:
    server.render(again(SD15, 2))
    with pytest.raises(PromptFailed) as caught:
        server.run(take_memory(1 << 40))
    assert caught.value.exception_type == "torch.OutOfMemoryError"
    assert "Got an OOM, unloading all loaded models." in server.log_text()
    assert server.devices()[0]["ooms"] == 1
    server.render(again(SD15, 3))


def test_model_that_does_not_fit_is_loaded_in_part(machine: Machine, picture: NDArray[np.uint8]) -> None:
    server = machine.server(*FP32, "--reserve-vram", "0.1", lunashm=False, LUNASHM_STANDIN_MEMORY=str(1400 * MB))
    assert distance(pixels(server.render(SD15)), picture) <= 2
    assert "loaded partially" in server.log_text()


def test_memory_that_a_host_holds_is_not_free_for_comfyui(machine: Machine) -> None:
    server = machine.server(lunashm=False)
    host = machine.host()
    before = server.system_stats()["devices"][0]["vram_free"]
    host.ask("load", str(machine.models / "checkpoints" / "sd15-tiny.safetensors"), "--device", "cuda")
    held = host.ask("ps", "--device", "cuda")["models"][0]["nbytes"]
    assert held > 200 * MB
    after = server.system_stats()["devices"][0]["vram_free"]
    assert held <= before - after < held + 64 * MB
    host.kill()
    assert server.system_stats()["devices"][0]["vram_free"] >= before


def test_server_with_the_extension_draws_the_same(machine: Machine, picture: NDArray[np.uint8]) -> None:
    server = machine.server(*FP32)
    assert distance(pixels(server.render(SD15)), picture) <= 2
