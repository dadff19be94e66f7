"""Parts 3 and 5 of the GPU suite: each step run dry with real servers, and what needs a GPU held against stand-ins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import front_end
from bench.comfy_server import ComfyServer
from bench.gpu import memory, memory_figures, memory_flags, memory_fleet, memory_modes, memory_ram
from bench.gpu.device_memory import PssMeter
from bench.gpu.memory_fleet import Fleet, Growth, Level, grown
from bench.report import Figure
from tests.bench.gpu_steps import dry, run, values
from tests.host_process import ROOT
from tests.tiers import comfy_checkout

GB = 10**9
SDXL = """
import importlib, json, sys
import torch
sys.path.insert(0, sys.argv[1])
importlib.import_module("comfy.cli_args").args.cpu = True
from bench import checkpoints
shapes = checkpoints.sdxl()
dtypes = {True: torch.int64, False: torch.float16}
meta = {n: torch.empty(s, dtype=dtypes[n.endswith("position_ids")], device="meta") for n, s in shapes.items()}
prefix = "model.diffusion_model."
config = importlib.import_module("comfy.model_detection").model_config_from_unet(meta, prefix)
unet = config.get_model(meta, prefix, device="meta").diffusion_model.state_dict()
with torch.device("meta"):
    clip = config.clip_target().clip(device="meta", dtype=torch.float16).state_dict()
given = config.process_clip_state_dict(dict(meta))
print(json.dumps({
    "config": type(config).__name__,
    "tensors": len(shapes),
    "unet parameters": sum(tensor.numel() for tensor in unet.values()),
    "unet as built": {prefix + n: list(t.shape) for n, t in unet.items()}
        == {n: list(s) for n, s in shapes.items() if n.startswith(prefix)},
    "clip lacks": sorted(set(clip) - set(given)),
    "clip differs": [name for name in set(clip) & set(given) if clip[name].shape != given[name].shape],
}))
"""


@pytest.mark.comfy
def test_full_size_checkpoint_is_sdxl_to_comfyui_down_to_every_shape() -> None:
    comfy = comfy_checkout()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SDXL, str(comfy)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["config"] == "SDXL"
    assert (found["tensors"], found["unet parameters"]) == (2515, 2_567_463_684)  # as in the published file
    assert found["unet as built"]
    assert found["clip differs"] == []
    # what published files lack, too
    assert set(found["clip lacks"]) <= {"clip_l.logit_scale", "clip_l.transformer.text_projection.weight"}


# -- dry runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.comfy
def test_single_compares_one_shared_server_with_stock(scratch: Path) -> None:
    found = run(memory.PART, "single", scratch)
    value = values(found)
    assert value["one instance: image byte-identical to stock's"] == 1
    assert value["one instance: load node, shared, host not yet warm"] > 0
    assert value["one instance: whole prompt, stock"] > 0
    assert "attached" in found.notes[-1]


@pytest.mark.comfy
def test_servers_share_once_more_of_them_come(scratch: Path) -> None:
    found = run(memory.PART, "servers-shared", scratch)
    value, unit = values(found), PssMeter.unit
    assert found.notes == []
    assert value["shared: images byte-identical to the first one's"] == 1
    assert value[f"shared, N=2: {unit}, attached"] > value[f"shared, N=1: {unit}, attached"] > 0
    weights = value["shared: the host's weights"]
    grown_by = value[f"shared: each extra instance, N=1 to 2, {unit}, attached"]
    started_by = value[f"shared: each extra instance, N=1 to 2, {unit}, idle"]
    assert grown_by - started_by < weights / 2  # beyond an idle server: no copy of the weights
    assert value["shared: load node, warm host, median"] > 0


@pytest.mark.comfy
def test_stock_servers_are_measured_the_same_way(scratch: Path) -> None:
    found = run(memory.PART, "servers-stock", scratch)
    assert found.notes == []
    assert values(found)["stock, N=1: all rendering at once"] > 0
    assert len(found.facts["stock: SHA-256 of the images"]) == 1


@pytest.mark.comfy
def test_server_with_a_copy_of_its_own_has_a_reason_and_no_figures(scratch: Path) -> None:
    fleet = grown(dry(scratch), "shared", (1, 2), {"LUNASHM_MODE": "force_local"})
    assert fleet.levels == {}
    assert "not shared" in fleet.notes[0]


@pytest.mark.comfy
def test_flags_say_whether_they_share_and_draw_as_stock(scratch: Path) -> None:
    comfy = comfy_checkout()
    assert comfy is not None
    if "--disable-dynamic-vram" not in (comfy / "comfy" / "cli_args.py").read_text():
        pytest.skip("this ComfyUI has no memory flag that goes together with --cpu")
    value = values(run(memory_modes.PART, "flags", scratch))
    assert value["--disable-dynamic-vram, shared: shares"] == 1
    assert value["--disable-dynamic-vram, shared: image byte-identical to stock's"] == 1


@pytest.mark.comfy
def test_weights_in_ram_are_shared_by_two_servers(scratch: Path) -> None:
    found = run(memory_modes.PART, "ram-tier", scratch)
    assert found.notes == []
    assert values(found)["weights in RAM, 2 servers, shared: PSS added by rendering"] > 0


# -- figures -----------------------------------------------------------------------------------------------------------


def level(count: int, gb: float, load_s: tuple[float, ...] = (), images: tuple[bytes, ...] = ()) -> Level:
    held = int(gb * GB)
    return Level(count, held, held, held, held + GB, 50.0, load_s, images, 30.0, count)


def named(figures: list[Figure], start: str) -> Figure:
    return next(figure for figure in figures if figure.figure.startswith(start))


def test_an_extra_instance_is_what_the_largest_fleet_has_over_the_smallest() -> None:
    fleet = Fleet("shared", "device memory", levels={1: level(1, 8.0), 8: level(8, 22.0)})
    found = memory_figures.figures(fleet)
    extra = named(found, "shared: each extra instance, N=1 to 8, device memory, peak")
    assert (extra.value, extra.met) == (pytest.approx(2.0), True)
    assert named(found, "shared, N=8: device memory, peak").value == 22.0
    peak = next(figure for figure in found if figure.figure == "shared, N=8: device memory, peak")
    assert (peak.value, peak.met) == (23.0, True)
    assert named(found, "shared, N=8: all").value == pytest.approx(16.0)


def test_who_waited_for_the_host_to_load_is_no_warm_load_node() -> None:
    levels = {1: level(1, 8.0, (20.0,), (b"a",)), 2: level(2, 9.0, (0.5,), (b"b",))}
    found = memory_figures.figures(Fleet("shared", "device memory", levels=levels))
    assert named(found, "shared: load node, warm host").value == 0.5
    images = named(found, "shared: images")
    assert (images.value, images.met) == (0.5, False)
    stock = memory_figures.figures(Fleet("stock", "device memory", levels=levels))
    assert named(stock, "stock: load node").value == pytest.approx(10.25)
    assert all(figure.target is None for figure in stock if "load node" in figure.figure)


def test_stock_servers_that_would_not_fit_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = Growth.__new__(Growth)
    growth.fleet = Fleet("stock", "device memory", before=GB, levels={1: level(1, 10.0)})
    growth._meter = PssMeter()
    monkeypatch.setattr(PssMeter, "total", lambda self: 80 * GB)
    assert growth.no_room(4) is None
    assert "stock N=8 was left out: it needs about 82.1 GB" in str(growth.no_room(8))
    growth.fleet.kind = "shared"
    assert growth.no_room(8) is None


def test_the_hosts_weights_are_not_taken_for_the_first_shared_server_s() -> None:
    renders = [
        memory_flags.Render("stock", (), b"a", 8 * GB, 9 * GB, ""),
        memory_flags.Render("shared", (), b"a", 8 * GB, 9 * GB, "[lunashm] attached x"),
        memory_flags.Render("shared", ("--novram",), b"b", 1 * GB, 2 * GB, "x is loaded locally: so"),
    ]
    value = {figure.figure: figure.value for figure in memory_flags._figures(renders, 7 * GB)}
    assert value["default flags, shared: memory added by a render"] == 1
    assert value["--novram, shared: memory added by a render"] == 1
    assert (value["default flags, shared: shares"], value["--novram, shared: shares"]) == (1, 0)
    assert value["default flags, shared: image byte-identical to stock's"] == 1


def test_weights_in_ram_are_counted_in_copies_of_the_file() -> None:
    held = {kind: memory_ram.Held(copies * 7 * GB, GB, GB, (b"a", b"a"), "") for kind, copies in
            (("stock", 2), ("shared", 1))}  # fmt: skip
    value = {figure.figure: figure.value for figure in memory_ram.figures(held, 7 * GB)}
    assert value["weights in RAM, 2 servers, shared: the same / the file"] == 1
    assert value["weights in RAM: images byte-identical to stock's"] == 1


# -- servers without a front end ---------------------------------------------------------------------------------------


@pytest.mark.comfy
def test_a_front_end_that_is_not_installed_is_stood_in_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server = ComfyServer(comfy=comfy_checkout(), base=tmp_path / "base")
    (tmp_path / "base").mkdir()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    command = server._command()
    folder = Path(command[command.index("--front-end-root") + 1])
    assert (folder / "index.html").is_file()
    monkeypatch.setenv(front_end.VARIABLE, str(tmp_path))
    command = server._command()
    assert command[command.index("--front-end-root") + 1] == str(tmp_path)


def test_steps_of_a_part_end_in_eight_minutes() -> None:
    for part in (memory.PART, memory_modes.PART):
        assert sum(step.expected_s for step in part.steps) < 480
        assert all(step.needs_comfyui for step in part.steps)
    assert memory_fleet.PROMPT_TIMEOUT_S < 480
