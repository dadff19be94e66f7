"""What other packs do with models and files: run inside ComfyUI's own environment, one process each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.comfy.conftest import ROOT, Host
from tests.tiers import comfy_checkout

pytestmark = pytest.mark.comfy

PRELUDE = """
import sys
sys.argv = ["main.py", "--cpu"]
import comfy.options
comfy.options.enable_args_parsing()
import torch, comfy.sd, comfy.utils, comfy.model_patcher, comfy.hooks
import comfy_ext
from comfy_ext.patcher import SharedModelPatcher, binding_of
"""


def run(host: Host, models: Path, body: str, timeout_s: float = 240) -> str:
    """Run ``body`` with ComfyUI imported and the extension installed; returns what it printed."""
    path = os.pathsep.join([str(comfy_checkout()), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + body],
        env=os.environ | host.environment | {"PYTHONPATH": path, "MODELS": str(models)},
        capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_a_foreign_patcher_with_weight_hooks_replaces_and_never_writes(host: Host, models: Path) -> None:
    body = """
import os
path = os.environ["MODELS"] + "/checkpoints/sd15-tiny.safetensors"
with torch.inference_mode():
    shared = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
assert type(shared) is SharedModelPatcher
foreign = comfy.model_patcher.ModelPatcher(shared.model, shared.load_device, shared.offload_device)
key = "diffusion_model.out.2.weight"
before = comfy.utils.get_attr(shared.model, key).clone()
hook = comfy.hooks.WeightHook()
foreign.add_hook_patches(hook, {key: ("diff", (torch.ones_like(before),))})
group = comfy.hooks.HookGroup()
group.add(hook)
foreign.patch_hooks(group)
assert torch.allclose(comfy.utils.get_attr(shared.model, key), before + 1, atol=1e-3)
foreign.unpatch_hooks()
assert torch.equal(comfy.utils.get_attr(shared.model, key), before)
print("alive")
"""
    assert "alive" in run(host, models, body)


def test_a_vae_made_of_changed_tensors_is_the_changed_one(host: Host, models: Path) -> None:
    body = """
import os, copy
path = os.environ["MODELS"] + "/vae/vae-tiny.safetensors"
def weights(sd):
    with torch.inference_mode():
        vae = comfy.sd.VAE(sd=sd)
    return {k: v.clone() for k, v in vae.first_stage_model.state_dict().items()}, binding_of(vae.first_stage_model)
def load():
    return comfy.utils.load_torch_file(path)
plain, binding = weights(load())
assert binding is not None
name = next(k for k in plain if plain[k].dim() == 4)
halved = {k: v * 0.5 for k, v in load().items()}
replaced = load()
for key in replaced:
    replaced[key] = replaced[key] * 0.5
written = load()
with torch.inference_mode():
    for key in written:
        written[key].mul_(0.5)
deep = copy.deepcopy(load())
for key in deep:
    deep[key].mul_(0.5)
for case in (halved, replaced, written, deep):
    got, _ = weights(case)
    assert all(torch.allclose(got[k], plain[k] * 0.5, atol=1e-3) for k in plain if plain[k].is_floating_point())
print("right")
"""
    assert "right" in run(host, models, body)


def test_a_refused_load_leaves_nothing_behind(host: Host, models: Path) -> None:
    body = """
import os, gc
gc.disable()
import comfy.model_base
path = os.environ["MODELS"] + "/../outside.safetensors"
with torch.inference_mode():
    model = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
assert type(model) is comfy.model_patcher.ModelPatcher
alive = [o for o in gc.get_objects() if isinstance(o, comfy.model_base.BaseModel)]
assert len(alive) == 1, f"{len(alive)} models are alive"
assert "outside.safetensors" not in open("/proc/self/maps").read()
print("clean")
"""
    outside = models.parent / "outside.safetensors"
    outside.hardlink_to(models / "checkpoints" / "sd15-tiny.safetensors")
    try:
        assert "clean" in run(host, models, body)
    finally:
        outside.unlink()
