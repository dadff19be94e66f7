"""Luna Config Gateway on real servers: the picture of the equivalent stock graph, and what it says about LoRAs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from bench.comfy_server import ComfyServer, PromptFailed
from bench.workflows import flux_unet, pixels, txt2img_checkpoint
from tests.comfy import graphs
from tests.comfy.conftest import KEEP_MODELS, ROOT, Host, running_host
from tests.comfy.gateways import NEGATIVE, PROMPT, distance, draw, gateway, node, sd15, with_stack
from tests.comfy.test_lora import ROUNDING
from tests.tiers import comfy_checkout

pytestmark = pytest.mark.comfy

SD15 = "sd15-tiny.safetensors"
OUTSIDE = "outside.safetensors"
LAYER = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def elsewhere(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models outside the host's roots, which are loaded locally, and LoRAs that only these tests know."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "checkpoints").mkdir()
    (folder / "loras" / "Deep" / "Er").mkdir(parents=True)
    shutil.copy(models / "checkpoints" / SD15, folder / "checkpoints" / OUTSIDE)
    good = load_file(models / "loras" / "a.safetensors")
    save_file(good, folder / "loras" / "Deep" / "Er" / "Inner v1.5.safetensors")
    save_file(good | {f"{LAYER}.lora_down.weight": torch.randn(4, 999)}, folder / "loras" / "unfit.safetensors")
    for name in ("changing", "Deep/twin", "Deep/Er/twin"):
        save_file(good, folder / "loras" / f"{name}.safetensors")
    (folder / "loras" / "gone.safetensors").symlink_to("nowhere")
    return folder


@pytest.fixture(scope="module")
def own_host(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with running_host(tmp_path_factory.mktemp("run"), [models]) as running:
        yield running


@pytest.fixture(scope="module")
def luna(models: Path, elsewhere: Path, own_host: Host) -> Iterator[ComfyServer]:
    with ComfyServer(
        comfy=comfy_checkout(), models=[models, elsewhere], environment=own_host.environment, arguments=KEEP_MODELS,
        custom_nodes={"lunashm": ROOT / "comfy_ext", "given": ROOT / "tests" / "comfy" / "packs" / "given_stack"},
    ) as server:  # fmt: skip
        yield server


STOCK = {
    "SD1.5": txt2img_checkpoint(SD15, seed=21),
    "SD1.5, clip skip 2": graphs.clip_skip(),
    "SD3": txt2img_checkpoint("sd3-tiny.safetensors", seed=22, sd3=True),
    "Flux": flux_unet("flux-tiny.safetensors", "clip-l.safetensors", "vae-tiny.safetensors", seed=23),
}


@pytest.mark.parametrize("name", STOCK)
def test_without_loras_the_picture_is_the_stock_graphs(name: str, stock: ComfyServer, luna: ComfyServer) -> None:
    theirs = STOCK[name]
    skips = "skip" in theirs
    plain = txt2img_checkpoint(SD15) if skips else theirs
    ours = draw(luna, gateway(plain, negative=theirs["negative"]["inputs"]["text"], clip_skip=2 * skips))
    assert distance(ours.image, pixels(stock.render(theirs))) == 0
    assert ours.metadata["positive"] == PROMPT and ours.metadata["loras"] == ours.stack == ours.lines == []
    assert " from the host at ipc://" in ours.metadata["origins"]["model"]


def test_the_batch_and_the_size_are_the_latents(stock: ComfyServer, luna: ComfyServer) -> None:
    theirs = txt2img_checkpoint(SD15, seed=24)
    theirs["latent"]["inputs"] |= {"batch_size": 2, "width": 96}
    entries = stock.run(theirs), luna.run(gateway(theirs))
    assert [len(entry["outputs"]["save"]["images"]) for entry in entries] == [2, 2]
    first, ours = (pixels(server.image(entry)) for server, entry in zip((stock, luna), entries, strict=True))
    assert first.shape == (64, 96, 3) and distance(ours, first) == 0


@pytest.fixture(scope="module")
def two_loras(stock: ComfyServer) -> NDArray[np.uint8]:
    """By stock LoraLoaders."""
    loras = [("b.safetensors", -0.5, 0.9), ("a.safetensors", 0.8, 0.6)]
    return pixels(stock.render(txt2img_checkpoint(SD15, seed=25, loras=loras)))


@pytest.mark.parametrize("model", ["shared", "local"])
@pytest.mark.parametrize("clip", ["shared", "local"])
def test_each_half_of_a_lora_goes_where_its_model_is(
    model: str, clip: str, two_loras: NDArray[np.uint8], luna: ComfyServer
) -> None:
    graph = sd15(f"{PROMPT} <lora:a:0.8:0.6>", seed=25)
    graph["outside"] = node("CheckpointLoaderSimple", ckpt_name=OUTSIDE)
    graph["gateway"]["inputs"] |= {
        "model": ["checkpoint" if model == "shared" else "outside", 0],
        "clip": ["checkpoint" if clip == "shared" else "outside", 1],
    }
    ours = draw(luna, with_stack(graph, [["b.safetensors", -0.5, 0.9]]))
    assert distance(ours.image, two_loras) <= ROUNDING
    assert [line.partition("[Luna")[2] for line in ours.lines] == [
        f"ConfigGateway] LoRA 'b.safetensors' -> MODEL {model} (-0.5), CLIP {clip} (0.9); stack size 1",
        f"ConfigGateway] LoRA 'a.safetensors' -> MODEL {model} (0.8), CLIP {clip} (0.6); stack size 2",
    ]
    for lora in ours.metadata["loras"]:
        assert (lora["model_to"], lora["clip_to"]) == (model, clip)
        assert lora["model_patches"] > 0 and lora["clip_patches"] > 0
    origins = ours.metadata["origins"]
    assert [origins[half].startswith("local") for half in ("model", "clip")] == [model == "local", clip == "local"]


def test_a_lora_in_tags_and_stack_is_applied_once_and_its_last_tag_wins(luna: ComfyServer) -> None:
    once = draw(luna, sd15(f"{PROMPT} <lora:a:0.8:0.6>", seed=26))
    text, negative = "<LORA:A.safetensors:0.1>, a lighthouse on a cliff, <lora:a:2>, morning light", "<lora:a:0.8:0.6>"
    often = with_stack(sd15(text, f"{negative} {NEGATIVE}", seed=26), [["a.safetensors", 1, 1], ["None", 1, 1], None])
    ours = draw(luna, often)
    assert distance(ours.image, once.image) == 0
    assert ours.loras == [("a.safetensors", 0.8, 0.6)] and ours.stack == [["a.safetensors", 0.8, 0.6]]
    assert (ours.metadata["positive"], ours.metadata["negative"]) == (PROMPT, NEGATIVE)
    assert sum("win over" in line for line in ours.lines) == 3
    assert sum("-> MODEL" in line for line in ours.lines) == 1


def test_what_is_not_found_is_one_warning_and_the_rest_goes_on(luna: ComfyServer) -> None:
    without = draw(luna, sd15(f"{PROMPT} <lora:b:0.7>", seed=27))
    ours = draw(luna, sd15(f"{PROMPT} <lora:nonexistent:1> <lora:b:0.7> <lora:nonexistent:0.5>", seed=27))
    assert distance(ours.image, without.image) == 0
    about = [line for line in ours.lines if "nonexistent" in line]
    assert len(about) == 1 and about[0].endswith("[LunaConfigGateway] Warning: LoRA 'nonexistent' not found, skipped")
    assert ours.metadata["not_found"] == ["nonexistent"] and ours.loras == without.loras


def test_a_tag_that_cannot_be_read_is_a_warning_and_no_text(luna: ComfyServer) -> None:
    ours = draw(luna, sd15(f"{PROMPT} <lora:a:strong>", seed=28))
    assert distance(ours.image, draw(luna, sd15(seed=28)).image) == 0
    assert "Warning: <lora:a:strong> is not <lora:name:weight>" in ours.lines[0] and ours.metadata["warnings"]


def test_strength_zero_is_no_lora_to_the_bit_and_is_reported(luna: ComfyServer) -> None:
    ours = draw(luna, sd15(f"{PROMPT} <lora:a:0>", seed=29))
    assert distance(ours.image, draw(luna, sd15(seed=29)).image) == 0
    assert ours.loras == [("a.safetensors", 0, 0)] and ours.stack == []


def test_a_file_in_a_subfolder_is_found_by_its_name_alone(luna: ComfyServer) -> None:
    named = draw(luna, sd15(f"{PROMPT} <lora:inner v1.5:0.8>", seed=30))
    assert distance(named.image, draw(luna, sd15(f"{PROMPT} <lora:a:0.8>", seed=30)).image) == 0
    assert named.stack == [["Deep/Er/Inner v1.5.safetensors", 0.8, 0.8]]
    ours = draw(luna, sd15(f"{PROMPT} <lora:deep\\er\\inner v1.5.SAFETENSORS:0.8>", seed=30))
    assert ours.stack == named.stack


def test_a_name_of_two_files_is_a_warning_with_both(luna: ComfyServer) -> None:
    ours = draw(luna, sd15("<lora:twin:0.8>", seed=31))
    assert ours.loras == [("Deep/twin.safetensors", 0.8, 0.8)]
    assert "Warning: LoRA 'twin' could be Deep/Er/twin.safetensors or Deep/twin.safetensors; " in ours.lines[0]


def test_a_link_to_nowhere_is_no_lora(luna: ComfyServer) -> None:
    assert draw(luna, sd15("<lora:gone:0.8>", seed=31)).metadata["not_found"] == ["gone"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_file_that_changed_is_read_again_and_only_then(linked: bool, elsewhere: Path, luna: ComfyServer) -> None:
    """``linked``: the text comes from another node, so that ComfyUI does not show it to IS_CHANGED."""
    graph = sd15(f"{PROMPT} <lora:changing:1>", seed=32 + linked)
    if linked:
        graph["text"] = node("PrimitiveStringMultiline", value=graph["gateway"]["inputs"]["positive"])
        graph["gateway"]["inputs"]["positive"] = ["text", 0]
    first = draw(luna, graph)
    before = len(luna.log_text())
    luna.run(graph)
    assert "[LunaConfigGateway]" not in luna.log_text()[before:], "it ran again for nothing"
    file = elsewhere / "loras" / "changing.safetensors"
    kept = load_file(file)
    try:
        save_file({key: tensor * -2 for key, tensor in kept.items()}, file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
        second = draw(luna, graph)
    finally:
        save_file(kept, file)
    assert len(second.lines) == 1
    assert distance(second.image, first.image) > 10 * ROUNDING


REFUSED = {
    "no list": ({"a": 1}, "lora_stack must be a list of (name, model strength, CLIP strength), but is {'a': 1} (dict)"),
    "a pair": ([["a.safetensors", 1]], "place 1 of lora_stack must be (name, model strength, CLIP strength), but is ["),
    "text as strength": ([["None", 1, 1], ["a.safetensors", 1, "1"]], "place 2 of lora_stack must be"),
    "NaN": ([["a.safetensors", float("nan"), 1]], "LoRA 'a.safetensors' is to have the strengths (nan, 1)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_stack_that_is_none_is_refused_with_what_it_is(case: str, luna: ComfyServer) -> None:
    stack, reason = REFUSED[case]
    with pytest.raises(PromptFailed) as failed:
        luna.run(with_stack(sd15(seed=34), stack))
    assert f"[LunaConfigGateway] {reason}" in failed.value.exception_message


def test_errors_name_what_is_wrong(luna: ComfyServer) -> None:
    cases = {"<lora:a:inf>": "LoRA 'a' is to have the strengths (inf, inf)", "<lora:unfit:1>": "unfit.safetensors does"}
    for text, reason in cases.items():
        with pytest.raises(PromptFailed) as failed:
            luna.run(sd15(text, seed=35))
        assert reason in failed.value.exception_message
    graph = with_stack(sd15(seed=36), None)
    graph["gateway"]["inputs"]["clip"] = ["given", 1]
    with pytest.raises(PromptFailed, match="clip is None"):
        luna.run(graph)


def test_stack_nodes_chain_and_the_gateway_takes_what_they_make(luna: ComfyServer) -> None:
    graph = sd15(seed=37)
    first = {"lora_2": "b.safetensors", "model_strength_2": -0.5, "clip_strength_2": 0.9, "lora_5": "None"}
    graph["first"] = node("LunaLoRAStack", **first)
    graph["second"] = node("LunaLoRAStack", lora_stack=["first", 0], lora_1="a.safetensors")
    graph["gateway"]["inputs"]["lora_stack"] = ["second", 0]
    ours = draw(luna, graph)
    assert ours.stack == [["b.safetensors", -0.5, 0.9], ["a.safetensors", 1.0, 1.0]]


def test_the_validator_says_what_the_gateway_would_find(luna: ComfyServer) -> None:
    text = "x <lora:inner v1.5> <lora:twin> <lora:chanting:1> <lora:a:b> <lora:a:0.5>"
    graph = with_stack({"gateway": node("LunaLoRAValidator", text=text)}, [["a.safetensors", 1, 1], ["lost.pt", 1, 1]])
    for index in range(3):
        graph[f"out{index}"] = node("PreviewAny", source=["gateway", index])
    outputs = luna.run(graph)["outputs"]
    found, report, missing = (outputs[f"out{index}"]["text"][0] for index in range(3))
    assert (found, missing.split("\n")) == ("False", ["lost.pt", "chanting"])
    assert outputs["gateway"]["text"] == [report]
    assert report.split("\n") == [
        "✓ a: a.safetensors (0.5, 0.5)",
        "✓ inner v1.5: Deep/Er/Inner v1.5.safetensors (1, 1)",
        "✓ twin: Deep/twin.safetensors (1, 1)",
        "✗ lost.pt: not found",
        "✗ chanting: not found; is changing.safetensors meant?",
        "⚠ <lora:a:b> is not <lora:name:weight> or <lora:name:weight:clip_weight>, left out",
        "⚠ LoRA 'twin' could be Deep/Er/twin.safetensors or Deep/twin.safetensors; Deep/twin.safetensors is used, "
        "write its folder and extension to be sure",
        "⚠ LoRA 'a.safetensors' is applied once: the tag's strengths (0.5, 0.5) win over the stack's strengths (1, 1)",
    ]


def test_without_a_host_the_picture_is_stocks_own(stock: ComfyServer, luna: ComfyServer, own_host: Host) -> None:
    own_host.stop()
    luna.free()
    try:
        ours = draw(luna, sd15(f"{PROMPT} <lora:a:0.8:0.6>", seed=38))
    finally:
        own_host.start()
        luna.free()
    assert "MODEL local (0.8), CLIP local (0.6)" in ours.lines[0]
    assert ours.metadata["origins"]["vae"].startswith("local")
    theirs = txt2img_checkpoint(SD15, seed=38, loras=[("a.safetensors", 0.8, 0.6)])
    assert distance(ours.image, pixels(stock.render(theirs))) == 0
