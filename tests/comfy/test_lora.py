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
    "hooks on top": graphs.hook_lora(loras=BOTH[1:]),
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


KINDS = """
from comfy.weight_adapter.lora import LoRAAdapter
from comfy.weight_adapter.loha import LoHaAdapter
from comfy.weight_adapter.glora import GLoRAAdapter
from comfy_ext.adapters import update_of
import comfy.lora
torch.manual_seed(0)
R = torch.randn
def lora(o, i, r=4, k=None, alpha=2.0, mid=False, dora=None):
    up, down, m = (R(o, r), R(r, i) * 0.1, None)
    if k is not None:
        up, down = R(o, r, 1, 1), R(r, i, 1, 1) * 0.1 if mid else R(r, i, k, k) * 0.1
        m = R(r, r, k, k) * 0.3 if mid else None
    tail = [1] * (0 if k is None else 2)
    d = {None: None, "out": torch.rand(o, 1, *tail) + 0.5, "in": torch.rand(1, i, *tail) + 0.5}[dora]
    return LoRAAdapter(set(), (up, down, alpha, m, d, None))
def patch(strength, value, strength_model=1.0, offset=None):
    return (strength, value, strength_model, offset, None)
L, C = (16, 24), (16, 8, 3, 3)
cases = {
    "lora": (L, [patch(0.8, lora(*L))]),
    "negative and without alpha": (L, [patch(0.8, lora(*L)), patch(-0.5, lora(*L, r=8, alpha=None))]),
    "strength_model": (L, [patch(0.8, lora(*L)), patch(-0.5, lora(*L), 0.7)]),
    "rows of a fused weight": ((48, 24), [patch(0.8, lora(*L), offset=(0, 16, 16)), patch(0.3, lora(48, 24), 0.9),
                                          patch(0.4, lora(*L), 0.5, (0, 0, 16))]),
    "columns of a fused weight": ((16, 48), [patch(0.8, lora(*L), offset=(1, 24, 24)), patch(0.3, lora(16, 48), 0.9),
                                             patch(0.4, lora(*L), 0.5, (1, 0, 24))]),
    "conv": (C, [patch(0.8, lora(16, 8, k=3))]),
    "locon with mid": (C, [patch(0.8, lora(16, 8, k=3, mid=True))]),
    "dora, outputs": (L, [patch(0.4, lora(*L)), patch(0.8, lora(*L, dora="out")),
                          patch(1.0, lora(*L, dora="out"), 0.9)]),
    "dora, inputs": (L, [patch(0.4, lora(*L)), patch(0.8, lora(*L, dora="in")), patch(1.0, lora(*L, dora="out"))]),
    "dora of a conv": (C, [patch(0.4, lora(16, 8, k=3)), patch(0.8, lora(16, 8, k=3, dora="out")),
                           patch(0.6, lora(16, 8, k=3, dora="in"))]),
    "dora of a slice": ((48, 24), [patch(0.4, lora(*L, dora="out"), offset=(0, 16, 16))]),
    "loha": (L, [patch(0.4, LoHaAdapter(set(), (R(16, 4), R(4, 24), 2.0, R(16, 4), R(4, 24), None, None, None)))]),
    "glora": (L, [patch(0.3, lora(*L)),
                  patch(0.4, GLoRAAdapter(set(), (R(24, 4) * 0.1, R(4, 24), R(16, 4), R(4, 24) * 0.1, 2.0, None)))]),
}
for name, (shape, patches) in cases.items():
    weight = R(*shape)
    exact = comfy.lora.calculate_weight(patches, weight.clone(), "key")
    update = update_of(patches, weight)
    assert (exact - weight).norm() > 1e-3 * weight.norm(), name
    assert (update.apply_to(weight) - exact).norm() <= 1e-6 * exact.norm(), name
    print("checked", name)
"""


def test_every_low_rank_kind_is_what_calculate_weight_makes(host: Host, models: Path) -> None:
    assert run(host, models, KINDS).count("checked") == 13


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
    assert model.is_clone(base) and model._injections
    before = model.model_size()
    key = next(iter(model._injections))
    exact = comfy.lora.calculate_weight(model.patches[key], comfy.utils.get_attr(base.model, key).float().clone(), key)
"""


def test_a_control_lora_and_a_saved_checkpoint_see_the_merged_weights(host: Host, models: Path) -> None:
    body = """
    model.model.current_patcher = model
    control = comfy.controlnet.ControlLora({"input_hint_block.0.weight": torch.zeros(16, 3, 3, 3)})
    key = next(k for k in model._injections if "input_blocks" in k)
    exact = comfy.lora.calculate_weight(model.patches[key], comfy.utils.get_attr(base.model, key).float().clone(), key)
    control.pre_run(model.model, lambda percent: percent)
    seen = comfy.utils.get_attr(control.control_model, key.removeprefix("diffusion_model."))
    assert torch.allclose(seen.float(), exact, atol=1e-5), "the control model got other weights"
    assert not model._injections
    model.detach()
    comfy.model_management.unload_all_models()
    base, model = patched()
    saved = model.state_dict_for_saving()["model." + key]
    assert torch.allclose(saved.to("cpu").float(), exact, atol=1e-5), "another weight would be saved"
    print("merged")
"""
    assert "merged" in run(host, models, PATCHED + body)


def test_unloading_takes_everything_off_again(host: Host, models: Path) -> None:
    body = """
    assert before > 0
    comfy.model_management.unload_all_models()
    assert not model._injections
    assert not any("forward" in module.__dict__ for module in model.model.modules())
    assert model.model_size() < before
    comfy.model_management.load_models_gpu([base])
    assert not base._injections
    print("clean")
"""
    assert "clean" in run(host, models, PATCHED + body)
