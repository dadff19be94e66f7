"""LoRAs as low-rank branches: what ComfyUI's own calculate_weight makes, without touching a shared weight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bench.comfy_server import ComfyServer
from bench.workflows import again, pixels, txt2img_checkpoint
from tests.comfy import graphs
from tests.comfy.conftest import Host
from tests.comfy.test_packs import run

pytestmark = pytest.mark.comfy

SD15 = "sd15-tiny.safetensors"
BOTH = [("a.safetensors", 0.8, 0.6), ("b.safetensors", -0.5, 0.9)]
ROUNDING = 2
"""Levels of 255. Stock rounds merged text encoder weights to fp16, and sums in another order."""

WORKFLOWS = {
    "one": txt2img_checkpoint(SD15, loras=BOTH[:1]),
    "two": txt2img_checkpoint(SD15, loras=BOTH),
    "the same twice": txt2img_checkpoint(SD15, loras=BOTH[:1] * 2),
    "hooks": graphs.hook_lora(),
    "keyframes": graphs.hook_lora(keyframes=True),
    "hooks on top": graphs.hook_lora(loras=BOTH[1:]),
    "model merge": graphs.model_merge(),
    "clip merge": graphs.clip_merge(),
    "keyframes on top": graphs.hook_lora(keyframes=True, loras=BOTH[1:]),
}


@pytest.mark.parametrize("name", WORKFLOWS)
def test_image_is_stocks_within_rounding(name: str, stock: ComfyServer, shared: ComfyServer) -> None:
    ours, theirs = (pixels(server.render(WORKFLOWS[name])).astype(int) for server in (shared, stock))
    assert np.abs(ours - theirs).max() <= ROUNDING


def test_without_lora_the_next_image_is_byte_identical_again(stock: ComfyServer, shared: ComfyServer) -> None:
    plain = txt2img_checkpoint(SD15, seed=9)
    shared.render(again(WORKFLOWS["two"], nonce=3))
    assert shared.render(plain) == stock.render(plain)


def test_strength_zero_is_byte_identical_to_no_lora(shared: ComfyServer) -> None:
    zero = txt2img_checkpoint(SD15, seed=5, loras=[("a.safetensors", 0.0, 0.0)])
    assert (pixels(shared.render(zero)) == pixels(shared.render(txt2img_checkpoint(SD15, seed=5)))).all()


def test_every_layer_is_low_rank_and_the_log_says_so(shared: ComfyServer) -> None:
    shared.render(again(WORKFLOWS["two"], nonce=4))
    lines = [line for line in shared.log_text().splitlines() if "layers low-rank" in line]
    assert any("BaseModel patched: " in line and "0 private (0.0 MB)" in line for line in lines)
    assert any("SD1ClipModel patched: " in line and "0 private (0.0 MB)" in line for line in lines)


@pytest.fixture(scope="module")
def kinds(host: Host, models: Path) -> list[tuple[str, str, str, float, float, float]]:
    """dtype, kind, way, our error, the merged layer's error, how much the patch changes: every line of kinds.py."""
    code = f"sys.path.append({str(Path(__file__).parent)!r})\nimport kinds\nkinds.main()"
    lines = [line.split("\t") for line in run(host, models, code).splitlines() if line.count("\t") == 5]
    return [(line[0], line[1], line[2], float(line[3]), float(line[4]), float(line[5])) for line in lines]


def test_every_kind_changes_the_layer(kinds: list[tuple[str, str, str, float, float, float]]) -> None:
    assert len(kinds) == 3 * 2 * 41
    assert min(change for *_, change in kinds) > 0.01


def test_every_kind_is_exact_in_float32(kinds: list[tuple[str, str, str, float, float, float]]) -> None:
    inexact = {(kind, way): ours for dtype, kind, way, ours, *_ in kinds if dtype == "float32" and ours > 1e-5}
    assert not inexact


def test_every_kind_is_as_close_as_merged_weights_in_half_precision(
    kinds: list[tuple[str, str, str, float, float, float]],
) -> None:
    ratios = {(dtype, kind, way): ours / stock for dtype, kind, way, ours, stock, _ in kinds if dtype != "float32"}
    assert not {case: ratio for case, ratio in ratios.items() if ratio > 1.02}, "2% of the error for chance"


PATCHED = """
import os
path = os.environ["MODELS"] + "/checkpoints/sd15-tiny.safetensors"
file = os.environ["MODELS"] + "/loras/a.safetensors"
import comfy.model_management, comfy.controlnet
def patched():
    base = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
    model = comfy.sd.load_lora_for_models(base, None, comfy.utils.load_torch_file(file), 0.9, 0)[0]
    comfy.model_management.load_models_gpu([model])
    return base, model
with torch.inference_mode():
    base, model = patched()
    around = base.model.lunashm.layers.injections
    assert model.is_clone(base) and around
    before = model.model_size()
    key = next(iter(around))
    exact = comfy.lora.calculate_weight(model.patches[key], comfy.utils.get_attr(base.model, key).float().clone(), key)
"""


def test_a_control_lora_sees_the_merged_weights(host: Host, models: Path) -> None:
    body = """
    model.model.current_patcher = model
    control = comfy.controlnet.ControlLora({"input_hint_block.0.weight": torch.zeros(16, 3, 3, 3)})
    key = next(k for k in around if "input_blocks" in k)
    exact = comfy.lora.calculate_weight(model.patches[key], comfy.utils.get_attr(base.model, key).float().clone(), key)
    control.pre_run(model.model, lambda percent: percent)
    seen = comfy.utils.get_attr(control.control_model, key.removeprefix("diffusion_model."))
    assert torch.allclose(seen.float(), exact, atol=1e-5), "the control model got other weights"
    assert not around
    print("merged")
"""
    assert "merged" in run(host, models, PATCHED + body)


def test_a_saved_checkpoint_has_the_merged_weights(host: Host, models: Path, tmp_path: Path) -> None:
    """What CheckpointSave does, on every version: UNet and text encoder, both drawn with before."""
    body = """
    base, clip = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=True)[:2]
    model, clip = comfy.sd.load_lora_for_models(base, clip, comfy.utils.load_torch_file(file), 0.9, 0.7)
    comfy.model_management.load_models_gpu([model, clip.patcher])
    exact = {}
    for patcher in (model, clip.patcher):
        key = next(k for k in patcher.patches if k.endswith(".weight"))
        weight = comfy.utils.get_attr(patcher.model, key)
        exact[".".join(key.split(".")[-6:])] = comfy.lora.calculate_weight(
            patcher.patches[key], weight.float().clone(), key)
    comfy.sd.save_checkpoint(os.environ["SAVED"], model, clip)
    saved = comfy.utils.load_torch_file(os.environ["SAVED"])
    for tail, weight in exact.items():
        name = next(name for name in saved if name.endswith(tail))
        error = (saved[name].float() - weight).norm() / weight.norm()
        assert error < 1e-3, f"{name} was saved as another: {error}"
        print("saved", name)
"""
    code = f"import os\nos.environ['SAVED'] = {str(tmp_path / 'saved.safetensors')!r}\n"
    assert run(host, models, code + PATCHED + body).count("saved") == 2


def test_unloading_takes_everything_off_again(host: Host, models: Path) -> None:
    body = """
    assert before > 0
    comfy.model_management.unload_all_models()
    assert not around
    assert not any("forward" in module.__dict__ for module in model.model.modules())
    assert model.model_size() < before
    comfy.model_management.load_models_gpu([base])
    assert not around
    print("clean")
"""
    assert "clean" in run(host, models, PATCHED + body)
