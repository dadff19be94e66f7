"""I9: what a shared model draws is, byte for byte, what the same model draws in unmodified ComfyUI."""

from __future__ import annotations

import pytest

from bench.comfy_server import ComfyServer
from bench.workflows import again, flux_unet, pixels, txt2img_checkpoint, vae_only
from lunashm.client import attach
from lunashm.paths import Endpoint
from tests.comfy import graphs
from tests.comfy.conftest import Host

pytestmark = pytest.mark.comfy

SD15 = "sd15-tiny.safetensors"
LORAS = txt2img_checkpoint(SD15, loras=[("a.safetensors", 0.8, 0.6), ("b.safetensors", -0.5, 0.9)])
KEYFRAMES = graphs.hook_lora(keyframes=True)
MERGE = graphs.model_merge()
"""The first two are equal to stock's within rounding: tests/comfy/test_lora.py."""

WORKFLOWS = {
    "sd15": txt2img_checkpoint(SD15),
    "sd3": txt2img_checkpoint("sd3-tiny.safetensors", sd3=True),
    "flux": flux_unet("flux-tiny.safetensors", "clip-l.safetensors", "vae-tiny.safetensors"),
    "flux in fp8": flux_unet(
        "flux-tiny.safetensors", "clip-l.safetensors", "vae-tiny.safetensors", weight_dtype="fp8_e4m3fn"
    ),
    "vae": vae_only("vae-tiny.safetensors"),
    "vae through a link": vae_only("linked.safetensors"),
    "clip skip": graphs.clip_skip(),
    "sd15 after all that": txt2img_checkpoint(SD15, seed=1, steps=3),
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_image_is_byte_identical_to_stocks(name: str, stock: ComfyServer, shared: ComfyServer) -> None:
    workflow = WORKFLOWS[name]
    ours = shared.render(workflow)
    assert pixels(ours).std() > 1, "a flat image would prove nothing"
    assert ours == stock.render(workflow)


def test_image_of_a_merge_is_stocks_to_the_bit(stock: ComfyServer, shared: ComfyServer) -> None:
    """Pixels, not files: the picture's metadata says which LoRA file was read (IS_CHANGED), stock's does not."""
    ours, theirs = (pixels(server.render(MERGE)) for server in (shared, stock))
    assert (ours == theirs).all()


def test_a_link_into_a_content_addressed_store_is_followed(shared: ComfyServer) -> None:
    shared.render(WORKFLOWS["vae through a link"])
    assert "attached linked.safetensors" in shared.log_text()


def test_both_files_of_a_dual_loader_are_attached(shared: ComfyServer) -> None:
    shared.run(graphs.dual_clip("clip-l.safetensors", "clip-g.safetensors"))
    log = shared.log_text()
    assert "attached clip-l.safetensors: 197 tensors" in log
    assert "attached clip-g.safetensors: 1 tensors" in log


def test_loras_and_merges_change_the_picture(shared: ComfyServer) -> None:
    plain = pixels(shared.render(WORKFLOWS["sd15"]))
    for name, workflow in (WORKFLOWS | {"two loras": LORAS, "keyframes": KEYFRAMES, "model merge": MERGE}).items():
        if name in ("two loras", "keyframes", "model merge", "clip skip"):
            assert (pixels(shared.render(workflow)) != plain).any(), f"{name} had no effect"


def test_every_parameter_is_shared_and_the_log_says_so(shared: ComfyServer, host: Host) -> None:
    shared.render(WORKFLOWS["sd15"])
    line = next(line for line in shared.log_text().splitlines() if f"attached {SD15}" in line)
    count, private = int(line.split(": ")[1].split()[0]), line.rsplit(", ", 1)[1]
    assert count >= 490 and private == "1.2 MB private", f"SD1.5 lacks only the unused text projection: {line}"
    assert SD15 in {lease["model"] for client in host.clients() for lease in client["leases"]}


def test_the_shared_bytes_are_untouched_by_all_of_it(shared: ComfyServer, host: Host) -> None:
    endpoint = Endpoint.parse(f"ipc://{host.runtime}/cpu.sock").url
    model = next(model for model in host.models() if model["name"] == SD15)
    dtypes = {prefix: dtype for prefix, dtype in model["rules"]}
    with attach(model["path"], dtypes=dtypes, endpoint=endpoint) as attachment:
        before = attachment.checksum()
        for workflow in (LORAS, KEYFRAMES, MERGE):
            shared.render(again(workflow, nonce=7))
        assert attachment.checksum() == before
