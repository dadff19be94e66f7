"""I8: four ComfyUIs on one host, each with a stack of LoRAs of its own, draw at the same time what each draws alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from bench.comfy_server import ComfyServer
from bench.workflows import Graph, pixels, txt2img_checkpoint
from lunashm.client import attach
from lunashm.paths import Endpoint
from tests.comfy.conftest import Host, LoraFiles, shared_server

pytestmark = [pytest.mark.comfy, pytest.mark.timeout(600)]

CHECKPOINT = "sd15-tiny.safetensors"
STACKS: dict[str, list[tuple[str, float, float]]] = {
    "none": [],
    "low-rank": [("peft LoRA, kohya keys", 0.8, 0.6), ("lycoris LoHa", -0.5, 0.9)],
    "mixed": [("lycoris LoKr", 1.0, 0.7), ("lycoris DoRA of outputs", 0.6, 0.0), ("lycoris OFT", 0.4, 0.4)],
    "whole weights": [("differences and replacements", 0.9, 0.0), ("text encoder, kohya keys", 0.0, 1.2)],
}
SEEDS = (1, 2)


def _workflows(stack: str, files: LoraFiles) -> list[Graph]:
    loras = [(files.node_name("sd15-tiny", name), model, clip) for name, model, clip in STACKS[stack]]
    return [txt2img_checkpoint(CHECKPOINT, seed=seed, loras=loras) for seed in SEEDS]


Images = dict[str, list[bytes]]


@dataclass(frozen=True)
class Drawn:
    alone: Images
    together: Images
    leases: list[dict[str, Any]]  # of the four servers, while all were up
    checksums: tuple[str, str]  # of the shared bytes, before and after the four drew


def _render(server: ComfyServer, workflows: list[Graph]) -> list[bytes]:
    return [server.render(workflow) for workflow in workflows]


def _alone(server: ComfyServer, work: dict[str, list[Graph]]) -> Images:
    """One stack after another, by one server that nobody disturbs and that has forgotten the stack before."""
    images = {}
    for stack, workflows in work.items():
        server.free()
        images[stack] = _render(server, workflows)
    return images


def _together(servers: dict[str, ComfyServer], work: dict[str, list[Graph]]) -> Images:
    """All stacks at once, a server each; nobody starts drawing before all are ready to."""
    ready = Barrier(len(work))

    def draw(stack: str) -> list[bytes]:
        ready.wait(60)
        return _render(servers[stack], work[stack])

    with ThreadPoolExecutor(len(work)) as threads:
        return dict(zip(work, threads.map(draw, work), strict=True))


@pytest.fixture(scope="module")
def drawn(host: Host, models: Path, lora_files: LoraFiles, shared: ComfyServer) -> Drawn:
    work = {stack: _workflows(stack, lora_files) for stack in STACKS}
    alone = _alone(shared, work)
    servers = {stack: shared_server(models, host.environment) for stack in STACKS}
    own = {lease["model"] for client in host.clients() for lease in client["leases"] if lease["pid"] == shared.pid}
    name = next(model for model in own if model.startswith(CHECKPOINT))  # with @2 if it is loaded in two sets of dtypes
    listed = next(model for model in host.models() if model["name"] == name)
    shared.free()
    endpoint = Endpoint.parse(f"ipc://{host.runtime}/cpu.sock").url
    with ExitStack() as running, attach(listed["path"], dtypes=dict(listed["rules"]), endpoint=endpoint) as mapped:
        before = mapped.checksum()
        with ThreadPoolExecutor(len(servers)) as threads:
            list(threads.map(running.enter_context, servers.values()))
        together = _together(servers, work)
        pids = {server.pid for server in servers.values()}
        leases = [lease for client in host.clients() for lease in client["leases"] if lease["pid"] in pids]
        assert listed["generation"] == mapped.manifest.generation, "other bytes than the servers' were summed"
        return Drawn(alone, together, leases, (before, mapped.checksum()))


@pytest.mark.parametrize("stack", STACKS)
def test_four_at_once_draw_what_each_draws_alone(stack: str, drawn: Drawn) -> None:
    assert drawn.together[stack] == drawn.alone[stack]


def test_every_stack_draws_a_picture_of_its_own(drawn: Drawn) -> None:
    """Else the servers could mix their stacks up and nobody would see it."""
    first = {stack: pixels(images[0]) for stack, images in drawn.alone.items()}
    assert all(image.std() > 1 for image in first.values()), "a flat image would prove nothing"
    assert len({image.tobytes() for image in first.values()}) == len(first)


def test_all_four_drew_with_the_hosts_bytes(drawn: Drawn) -> None:
    assert len({lease["client"] for lease in drawn.leases if lease["model"].startswith(CHECKPOINT)}) == len(STACKS)


def test_four_at_once_change_no_shared_byte(drawn: Drawn) -> None:
    before, after = drawn.checksums
    assert after == before
