from __future__ import annotations

import os
import re

import pytest

from lunashm.cli import exits, load
from lunashm.errors import UnsupportedFormat
from lunashm.manifest import DtypeRule
from lunashm.protocol import LoadProgress

from .conftest import checkpoint


def test_load_says_whether_it_had_to(cli, models, monkeypatch):
    checkpoint(models / "new.safetensors")
    monkeypatch.chdir(models)
    first = cli("load", "new.safetensors", "--json").json
    assert (first["was_loaded"], first["model"]["tensors"]) == (False, 3)
    assert cli("load", "new.safetensors", "--json").json["was_loaded"] is True
    assert "was loaded already" in cli("load", "./new.safetensors").out


def test_load_says_how_long_it_took_and_how_fast_that_is(cli, models):
    out = cli("load", checkpoint(models / "a.safetensors")).out
    assert re.match(r"loaded a\.safetensors in \d+\.\d s \(\d+\.\d\d GB/s\): 3 tensors, ", out)


def test_load_converts_by_prefix(cli, models):
    path = checkpoint(models / "half.safetensors", tensors=3)
    model = cli("load", path, "--dtype", "bf16", "--dtype", "layer0.=F32", "--json").json["model"]
    assert model["dtypes"] == {"F32": 64, "BF16": 64}


def test_prefix_that_no_tensor_has_is_named(cli, models):
    path = checkpoint(models / "b.safetensors")
    result = cli("load", path, "--dtype", "zz.=BF16", "--dtype", "layer0.=F32")
    assert "no tensor's name begins with 'zz.': that --dtype changed nothing" in result.err
    assert "layer0." not in result.err


def test_wait_0_starts_the_load_and_returns(cli, models):
    path = checkpoint(models / "later.safetensors")
    assert cli("load", path, "--wait", "0", "--json").json == {"path": str(path), "state": "loading"}
    assert cli("load", path).code == 0


@pytest.mark.parametrize(
    ("make", "code", "name"),
    [(lambda root: root / "none.safetensors", exits.NOT_FOUND, "model_not_found"),
     (lambda root: "/etc/hostname", exits.REFUSED, "path_not_allowed"),
     (lambda root: write(root / "a.ckpt", b"\x80\x02"), exits.REFUSED, "unsupported_format"),
     (lambda root: write(root / "cut.safetensors", b"\xff" * 7), exits.REFUSED, "invalid_checkpoint")],
)  # fmt: skip
def test_what_cannot_be_loaded_is_refused_with_its_reason(cli, models, make, code, name):
    result = cli("load", make(models), "--json")
    assert (result.code, result.json["error"]["code"]) == (code, name)


def write(path, data):
    path.write_bytes(data)
    return path


def test_a_name_that_is_not_utf8_is_refused(cli, models):
    result = cli("load", os.fsdecode(b"\xff.safetensors"), "--json")
    assert (result.code, result.json["error"]["code"]) == (exits.REFUSED, "unsupported_format")


def test_a_dtype_without_prefix_is_for_all_tensors():
    assert load.rules([]) == (DtypeRule("", ""),)
    assert load.rules(["f16", "vae.=f32"]) == (DtypeRule("", "F16"), DtypeRule("vae.", "F32"))
    with pytest.raises(UnsupportedFormat, match="Q4"):
        load.rules(["Q4"])


def test_what_a_comfyui_takes_depends_on_where_it_computes():
    assert load._comfyui(None, "cpu") == ()
    assert load._comfyui("comfyui", "cpu") == load._comfyui("comfyui-cpu", "GPU-1") == load.COMFYUI_CPU
    assert load._comfyui("comfyui", "GPU-1") == load._comfyui("comfyui-gpu", "cpu") == load.COMFYUI_GPU
    assert load.rules(list(load.COMFYUI_GPU))[0] == DtypeRule("", "")  # a UNet as it is stored


def test_ctrl_c_leaves_the_load_running_and_says_so(cli, models, monkeypatch):
    path = checkpoint(models / "kept.safetensors")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(load, "_await", interrupted)
        result = cli("load", path)
    assert (result.code, result.out) == (exits.INTERRUPTED, "")
    assert "goes on loading" in result.err


def test_the_bar_follows_this_file_alone(tmp_path):
    bar = load._Bar(str(tmp_path / "a.safetensors"))
    bar.follow(LoadProgress("/other", "other", 9, 10, 1.0))
    assert bar.progress.tasks[0].total is None
    bar.follow(LoadProgress(str(tmp_path / "a.safetensors"), "a", 3 * 10**9, 4 * 10**9, 2.0))
    task = bar.progress.tasks[0]
    assert (task.completed, task.total, task.fields["speed"]) == (3 * 10**9, 4 * 10**9, "1.50 GB/s")
