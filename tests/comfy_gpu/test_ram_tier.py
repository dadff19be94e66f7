"""ComfyUI on a GPU with a host of RAM: one copy of the weights there for all, copies on the GPU while they are used."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.workflows import again, pixels, txt2img_checkpoint
from tests.comfy_gpu.conftest import Machine, Server
from tests.cuda.conftest import GpuHost

pytestmark = pytest.mark.comfy_gpu

MB = 1_000_000
CHECKPOINT = "sd15-tiny.safetensors"
SD15 = txt2img_checkpoint(CHECKPOINT)
LORAS = [("a.safetensors", 1.0, 1.0), ("b.safetensors", -0.5, 0.5)]
LORA = txt2img_checkpoint(CHECKPOINT, loras=LORAS)


@pytest.fixture(scope="module")
def pictures(shared_machine: Machine) -> dict[str, NDArray[np.uint8]]:
    """What stock ComfyUI draws on the same GPU without flags."""
    server = shared_machine.server(lunashm=False)
    found = {"plain": pixels(server.render(SD15)), "lora": pixels(server.render(LORA))}
    server.stop()
    return found


@pytest.fixture(scope="module")
def host(shared_machine: Machine, pictures: dict[str, NDArray[np.uint8]]) -> GpuHost:
    return shared_machine.host("--device", "cpu")


def ram(server: Server) -> float:
    """PSS without what stands for the GPU's memory: each page divided by the processes that map it."""
    total, counted = 0, True
    for line in Path(f"/proc/{server.pid}/smaps").read_text().splitlines():
        if re.match(r"^[0-9a-f]+-[0-9a-f]+ ", line):
            counted = "/memfd:" not in line
        elif counted and line.startswith("Pss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_two_servers_draw_stocks_picture_from_one_copy_in_ram(
    shared_machine: Machine, host: GpuHost, pictures: dict[str, NDArray[np.uint8]]
) -> None:
    servers = [shared_machine.server(), shared_machine.server()]
    stock = shared_machine.server(lunashm=False)
    idle = [ram(server) for server in (*servers, stock)]
    for server in servers:
        assert (pixels(server.render(SD15)) == pictures["plain"]).all()
        models = server.loaded()
        assert set(models) == {"BaseModel", "SD1ClipModel", "TAESD"}
        for model in models.values():
            assert model["patcher"] == "SharedModelPatcher"
            assert set(model["tensors"]) == {"npu:0"}, "it fits: all of it is on the GPU"
            assert model["loaded_nbytes"] >= sum(model["nbytes"].values()) - MB, "unloading it would give that back"
    stock.render(SD15)
    for server in (*servers, stock):
        server.run({"unload": {"class_type": "UnloadModels", "inputs": {"nonce": 1}}})
    weights = next(model["nbytes"] for model in host.ask("ps", "--device", "cpu")["models"])
    added = [ram(server) - before for server, before in zip((*servers, stock), idle, strict=True)]
    print("RAM added by a render, MB of PSS: two with the host, one stock:", [round(nbytes / MB) for nbytes in added])
    assert weights > 290 * MB
    assert "the host lends RAM" in servers[0].log_text()
    assert added[2] > 0.4 * weights, "stock offloads to a copy of its own; the kernel may have taken idle pages back"
    assert added[0] + added[1] < weights + 200 * MB, "two have one copy between them, and the host has a part of that"
    for server in (*servers, stock):
        server.stop()


def test_offloading_goes_back_to_the_hosts_bytes(
    shared_machine: Machine, host: GpuHost, pictures: dict[str, NDArray[np.uint8]]
) -> None:
    server = shared_machine.server()
    server.render(SD15)
    before = server.devices()[0]
    server.run({"unload": {"class_type": "UnloadModels", "inputs": {"nonce": 1}}})
    after = server.devices()[0]
    assert after["allocated"] < before["allocated"] - 250 * MB
    assert after["from_device_bytes"] - before["from_device_bytes"] < 4 * MB, "nothing but buffers was copied back"
    assert (pixels(server.render(again(SD15, 1))) == pictures["plain"]).all()
    server.stop()


@pytest.mark.parametrize("flags", [("--novram",), ("--reserve-vram", "7.17")], ids="".join)
def test_what_does_not_fit_is_cast_layer_by_layer(
    shared_machine: Machine, host: GpuHost, pictures: dict[str, NDArray[np.uint8]], flags: tuple[str, ...]
) -> None:
    server = shared_machine.server(*flags)
    stock = shared_machine.server(*flags, lunashm=False)
    assert (pixels(server.render(SD15)) == pixels(stock.render(SD15))).all()
    theirs, ours = pixels(stock.render(LORA)).astype(int), pixels(server.render(LORA)).astype(int)
    assert np.abs(theirs - ours).max() <= 16
    assert np.abs(theirs - ours).mean() < 1
    model = server.loaded()["BaseModel"]
    assert model["nbytes"]["cpu"] > 10 * MB, "still the host's"
    assert model["patcher"] == "SharedModelPatcher"
    server.stop()
    stock.stop()


def test_lora_does_not_copy_the_unet_anew(shared_machine: Machine, host: GpuHost) -> None:
    """The text encoder is: ComfyUI has it compute in another dtype than its own, which is done while it is loaded."""
    server = shared_machine.server()
    server.render(SD15)
    server.reset()
    server.render(LORA)
    copied = {name: model["nbytes"]["npu:0"] for name, model in server.loaded().items()}
    assert server.devices()[0]["to_device_bytes"] < copied["SD1ClipModel"] + 0.2 * copied["BaseModel"]
    server.stop()


def test_host_of_the_gpu_is_preferred(machine: Machine) -> None:
    machine.host("--device", "cpu")
    machine.host("--device", "cuda:0")
    server = machine.server()
    server.render(SD15)
    assert "npu:0 (lent)" in server.loaded()["BaseModel"]["nbytes"]
    other = machine.server(LUNASHM_DEVICE="cpu")
    other.render(SD15)
    assert "npu:0 (lent)" not in other.loaded()["BaseModel"]["nbytes"]
    assert other.loaded()["BaseModel"]["patcher"] == "SharedModelPatcher"
