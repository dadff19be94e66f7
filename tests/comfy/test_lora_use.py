"""LoRAs on a shared model beyond the picture: hooks, files that do not fit, files that change, what is copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import loras
from bench.comfy_server import ComfyServer
from bench.workflows import again, pixels, txt2img_checkpoint
from tests.comfy.conftest import Host
from tests.comfy.test_packs import run

pytestmark = pytest.mark.comfy

LAYER = "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"

SET_UP = """
import logging, os
logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(levelname)s %(message)s", force=True)
import folder_paths, comfy.model_management, comfy.hooks
from comfy.weight_adapter.lora import LoRAAdapter
models = os.environ["MODELS"]
folder_paths.add_model_folder_path("loras", models + "/loras")
base, clip = comfy.sd.load_checkpoint_guess_config(
    models + "/checkpoints/sd15-tiny.safetensors", output_vae=False, output_clip=True)[:2]
layer = "LAYER"
weight = comfy.utils.get_attr(base.model, layer + ".weight")
torch.manual_seed(0)
x = torch.randn(1, 64, weight.shape[1])
def out():
    with torch.inference_mode():
        return comfy.utils.get_attr(base.model, layer)(x)
def lora(name):
    return comfy.utils.load_torch_file(models + "/loras/" + name, safe_load=True)
def patched(name, model=base, strength=1.0):
    return comfy.sd.load_lora_for_models(model, None, lora(name), strength, 0.0)[0]
def load(model):
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([model], force_full_load=True)
def shared_pointers():
    return {name: parameter.data_ptr() for name, parameter in base.model.named_parameters()}
load(base)
plain, pointers, layers = out(), shared_pointers(), base.model.lunashm.layers
""".replace("LAYER", LAYER)


@pytest.fixture(scope="module")
def odd(models: Path) -> Path:
    """LoRAs that something is wrong with, beside the good one they are made of."""
    folder = models / "loras"
    good = load_file(folder / "a.safetensors")
    down, up = f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight"
    save_file(good | {down: torch.randn(4, 999)}, folder / "misfit.safetensors")
    save_file(good | {up: torch.full_like(good[up], float("nan"))}, folder / "nan.safetensors")
    save_file(good | {f"nowhere.{i}.lora_up.weight": torch.zeros(4, 4) for i in range(8)}, folder / "extra.safetensors")
    biases = {f"{LAYER.replace('to_q', 'to_out.0')}.diff_b": torch.randn(320)}
    save_file(biases, folder / "bias.safetensors")
    return folder


def test_weight_hooks_exchange_updates_and_copy_nothing(host: Host, models: Path) -> None:
    body = """
model, _, group = comfy.hooks.load_hook_lora_for_models(patched("a.safetensors"), None, lora("b.safetensors"), 0.7, 0.0)
load(model)
alone = out()
key = layer + ".weight"
together = model.patches[key] + model.get_combined_hook_patches(group)[key]
exact = comfy.lora.calculate_weight(together, weight.float().clone(), key)
group.set_keyframes_on_hooks(comfy.hooks.HookKeyframeGroup())
model.apply_hooks(group)
assert ((out() - x @ exact.T).norm() / (x @ exact.T).norm()) < 1e-5, "not both LoRAs"
assert shared_pointers() == pointers and not model.hook_backup, "something was copied"
hooked = out()
model.apply_hooks(None)
assert torch.equal(out(), alone), "the LoRA below the hook changed"
model.apply_hooks(group)
assert torch.equal(out(), hooked), "from the cache it is another"
load(base)
assert torch.equal(out(), plain) and not layers.injections
print("exchanged")
"""
    assert "exchanged" in run(host, models, SET_UP + body)


@pytest.mark.usefixtures("odd")
def test_a_shape_that_cannot_fit_is_an_error_with_both_shapes_and_the_model_stays(host: Host, models: Path) -> None:
    body = """
try:
    patched("misfit.safetensors")
except RuntimeError as exc:
    print(exc)
load(base)
assert torch.equal(out(), plain) and not base.patches
"""
    printed = run(host, models, SET_UP + body)
    assert f"misfit.safetensors does not fit this model: {LAYER}.weight is [" in printed
    assert "999]" in printed


@pytest.mark.usefixtures("odd")
def test_keys_without_a_layer_are_one_warning_with_their_number(host: Host, models: Path) -> None:
    body = """
load(patched("extra.safetensors"))
assert not torch.equal(out(), plain), "the rest was not applied"
"""
    printed = run(host, models, SET_UP + body)
    about = [line for line in printed.splitlines() if "nowhere" in line]
    assert len(about) == 1
    assert about[0].startswith("WARNING [lunashm] extra.safetensors: no layer for 8 keys: ")
    assert about[0].endswith(" and 3 more")


@pytest.mark.usefixtures("odd")
def test_nan_is_reported_with_file_and_key(host: Host, models: Path) -> None:
    printed = run(host, models, SET_UP + 'patched("nan.safetensors")')
    assert f"nan.safetensors has NaN or infinite values in 1 key: {LAYER}.lora_up.weight" in printed


def test_a_file_is_read_once_and_again_when_it_changed(host: Host, models: Path) -> None:
    body = """
import shutil
name = models + "/loras/changing.safetensors"
shutil.copy(models + "/loras/a.safetensors", name)
first, second = lora("changing.safetensors"), lora("changing.safetensors")
key = layer + ".lora_up.weight"
assert first[key] is second[key] and first is not second
shutil.copy(models + "/loras/b.safetensors", name + ".new")
os.replace(name + ".new", name)
assert torch.equal(lora("changing.safetensors")[key], lora("b.safetensors")[key])
print("read again")
"""
    assert "read again" in run(host, models, SET_UP + body)


@pytest.mark.usefixtures("odd")
def test_private_copies_end_at_the_budget_with_the_model_as_it_was(
    host: Host, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = """
model = patched("a.safetensors", patched("bias.safetensors"))
try:
    load(model)
except RuntimeError as exc:
    print(exc)
assert shared_pointers() == pointers
assert torch.equal(out(), plain) and not layers.injections
"""
    monkeypatch.setenv("LUNASHM_PRIVATE_GB", "0")
    printed = run(host, models, SET_UP + body)
    assert "1 patched tensors of BaseModel need private copies" in printed
    assert "LUNASHM_PRIVATE_GB" in printed


@pytest.mark.usefixtures("odd")
def test_the_report_counts_layers_by_the_way_they_went(host: Host, models: Path) -> None:
    body = """
model = patched("a.safetensors", patched("bias.safetensors"))
other = layer.replace("to_q", "to_v") + ".weight"
model.add_patches({other: ("diff", (torch.randn(comfy.utils.get_attr(base.model, other).shape),))})
load(model)
print("report:", model.rungs)
assert model.rungs.transient == 1 and model.rungs.private == 1 and model.rungs.low_rank == len(layers.injections) - 1
"""
    printed = run(host, models, SET_UP + body)
    assert "1 transient (" in printed.split("report:")[1]
    assert "BaseModel patched: " in printed


def test_a_merge_copies_nothing_and_says_its_cost_once(host: Host, models: Path) -> None:
    body = """
merge = base.clone()
merge.add_patches(base.get_key_patches("diffusion_model."), 0.5, 0.5)
matrices = {key for key in merge.patches if comfy.utils.get_attr(base.model, key).dim() > 1}
merge.patches = {key: patches for key, patches in merge.patches.items() if key in matrices}
load(merge)
assert torch.allclose(out(), plain, atol=1e-5)
assert shared_pointers() == pointers, "something was copied"
"""
    printed = run(host, models, SET_UP + body)
    assert printed.count("is a merge: ") == 1


@pytest.mark.usefixtures("odd")
def test_after_any_sequence_the_plain_model_is_a_fresh_one_bit_for_bit(host: Host, models: Path) -> None:
    body = """
import random
choose = random.Random(5)
files = base.model.lunashm.files
sums = [file.attachment.checksum() for file in files]
state = {"model": base, "group": None}
def more(name):
    state["model"] = patched(name, state["model"], choose.choice([0.0, 0.8, -0.5]))
def fresh():
    state.update(model=base, group=None)
def hook():
    if state["group"] is None:
        state["model"], _, state["group"] = comfy.hooks.load_hook_lora_for_models(
            state["model"], None, lora("b.safetensors"), 0.7, 0.0)
def difference():
    state["model"] = state["model"].clone()
    state["model"].add_patches({layer + ".weight": ("diff", (torch.ones_like(weight),))}, 0.1)
def misfit():
    try:
        more("misfit.safetensors")
        raise SystemExit("a LoRA that cannot fit was applied")
    except RuntimeError:
        pass
def break_down():
    key = next(iter(state["model"].patches), None)
    if key is not None:  # an error while the stack is put on
        broken = state["model"].clone()
        broken.add_callback("on_load_after", lambda *a: (_ for _ in ()).throw(RuntimeError("broken")))
        try:
            load(broken)
        except RuntimeError:
            pass
operations = [
    lambda: more("a.safetensors"), lambda: more("b.safetensors"), lambda: more("bias.safetensors"), fresh, hook,
    lambda: load(state["model"]), lambda: load(state["model"]), difference, misfit, break_down,
    lambda: (load(state["model"]), state["group"] and state["model"].apply_hooks(state["group"])),
    lambda: (load(state["model"]), state["model"].apply_hooks(None)),
    lambda: (load(state["model"]), state["model"].make_all_private("a test asks")),
    comfy.model_management.unload_all_models,
]
for step in range(120):
    choose.choice(operations)()
    if step % 6 == 5:
        load(base)
        assert torch.equal(out(), plain), step
        assert shared_pointers() == pointers and not layers.injections, step
assert [file.attachment.checksum() for file in files] == sums
print("fresh")
"""
    assert "fresh" in run(host, models, SET_UP + body)


def test_a_deep_copy_has_bytes_and_loras_of_its_own(host: Host, models: Path) -> None:
    """As a pack makes one that changes layers: with what is on them, as stock's merged weights would be copied."""
    body = """
import copy
load(patched("a.safetensors"))
patched_out = out()
twin = copy.deepcopy(base.model.diffusion_model)
mine = comfy.utils.get_attr(twin, layer.removeprefix("diffusion_model."))
load(base)
with torch.inference_mode():
    assert torch.equal(mine(x), patched_out)
assert torch.equal(out(), plain)
assert not {p.data_ptr() for p in twin.parameters()} & set(pointers.values())
print("apart")
"""
    assert "apart" in run(host, models, SET_UP + body)


def test_a_layer_that_an_object_patch_hides_is_passed_over(host: Host, models: Path) -> None:
    body = """
attention = layer.rpartition(".")[0]
class Other(torch.nn.Module):
    def forward(self, x, *args, **kwargs):
        return x
model = patched("a.safetensors")
model.add_object_patch(attention, Other())
load(model)
assert layer + ".weight" not in layers.injections and layers.injections
load(base)
assert torch.equal(out(), plain)
load(patched("a.safetensors"))
assert not torch.equal(out(), plain), "the layer is back, its LoRA is not"
print("passed over")
"""
    assert "passed over" in run(host, models, SET_UP + body)


def test_embeddings_and_weights_that_are_read_directly_come_out_right(host: Host, models: Path) -> None:
    body = """
os.environ["LUNASHM_MODE"] = "force_local"
local = comfy.sd.load_checkpoint_guess_config(
    models + "/checkpoints/sd15-tiny.safetensors", output_vae=False, output_clip=True,
    te_model_options={"dtype": torch.float32})[1]
def cond(clip, change):
    torch.manual_seed(3)
    clip = clip.clone()
    for table in ("position_embedding", "token_embedding"):
        key = f"clip_l.transformer.text_model.embeddings.{table}.weight"
        rows, columns = comfy.utils.get_attr(clip.patcher.model, key).shape
        factors = (torch.randn(rows, 4) * 0.05, torch.randn(4, columns) * 0.05)
        if change:
            clip.add_patches({key: LoRAAdapter(set(), (*factors, 4.0, None, None, None))}, 0.9)
    with torch.inference_mode():
        return clip.encode_from_tokens(clip.tokenize("a lighthouse at dusk"))
before, ours, theirs = cond(clip, False), cond(clip, True), cond(local, True)
assert (theirs - before).norm() > 1e-2 * before.norm(), "the patch changes nothing"
error = ((ours - theirs).norm() / theirs.norm()).item()
print("error", error)
assert error < 5e-4, "fp16 is what a private copy of the position embedding is rounded to, as in stock"
print("right")
"""
    assert "right" in run(host, models, SET_UP + body)


def test_a_lora_file_that_changed_makes_another_picture(shared: ComfyServer, models: Path) -> None:
    name = models / "loras" / "edited.safetensors"
    shutil.copy(models / "loras" / "a.safetensors", name)
    workflow = txt2img_checkpoint("sd15-tiny.safetensors", loras=[("edited.safetensors", 1.0, 1.0)])
    before = shared.render(workflow)
    base = models / "checkpoints" / "sd15-tiny.safetensors"
    loras.make(base, name, rank=4, strength=0.3, seed=7)
    after = shared.render(again(workflow, nonce=2))
    assert (pixels(after) != pixels(before)).any()
