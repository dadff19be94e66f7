"""Part 4 of the GPU suite: each step run dry, and what its figures say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.gpu import lora, lora_accuracy
from bench.gpu.lora_pictures import Turns, figures, psnr
from bench.lora_rule import Cell, best_constants, loss
from tests.bench.gpu_steps import run, values
from tests.tiers import comfy_checkout


@pytest.fixture(autouse=True)
def has_bypass(request: pytest.FixtureRequest) -> None:
    comfy = comfy_checkout() if request.node.get_closest_marker("comfy") else None
    if comfy is not None and "def load_bypass_lora_for_models" not in (comfy / "comfy" / "sd.py").read_text():
        pytest.skip("this ComfyUI has no bypass to compare with")


@pytest.mark.comfy
def test_steps_measure_every_way_and_all_compute_the_same(scratch: Path) -> None:
    found = run(lora.PART, "steps", scratch)
    value = values(found)
    assert value["sd15-tiny-fp16, 2 LoRAs: output of ours against stock merge, relative"] < 1e-4
    assert value["sd15-tiny-fp16, 2 LoRAs: output of bypass against stock merge, relative"] < 1e-4
    assert "2 LoRAs of rank 4: a step takes longer by" in value
    assert value["sd15-tiny-fp16, private memory of a stack of 2: ours, counted by the patcher / factors"] <= 1.2
    assert found.samples["sd15-tiny-fp16, ours: switch of 2, s"]


@pytest.mark.comfy
def test_servers_draw_the_same_with_loras_but_for_rounding(scratch: Path) -> None:
    found = run(lora.PART, "servers", scratch)
    value = values(found)
    assert value["server, 0 LoRAs: PSNR against stock"] == 999
    assert 40 < value["server, 2 LoRAs: PSNR against stock"] <= 999
    assert value["server, 2 LoRAs: largest difference of a pixel"] <= 2
    assert any("low-rank" in note for note in found.notes)


def test_rule_and_accuracy_run_without_a_gpu(tmp_path: Path) -> None:
    value = values(run(lora.PART, "rule", tmp_path))
    assert value["the best constant's choices / the better way each time"] >= 1
    value = values(run(lora.PART, "accuracy", tmp_path))
    assert value["bf16: error of a branch / of merged weights, worst"] <= 1.1


def test_a_lora_that_is_not_applied_would_show_as_an_error_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lunashm.client.lowrank.Injection.takes_fresh_weight", lambda self, x: False)
    found = lora_accuracy.errors_of((64, 64, 32), 0.1, "cpu", torch.float16)
    assert found["branch"] < 0.01
    monkeypatch.setattr("lunashm.client.lowrank.Injection._forward", lambda self, x: self._stock(x))
    assert lora_accuracy.errors_of((64, 64, 32), 0.1, "cpu", torch.float16)["branch"] == pytest.approx(1.0, rel=0.1)


def cell(branch_s: float, fresh_s: float, break_even: float) -> Cell:
    return Cell("a layer", 16, 1.0, branch_s, fresh_s, False, break_even)


def test_the_best_constants_are_those_between_break_even_points_that_lose_least() -> None:
    cells = [cell(2.0, 1.0, 400.0), cell(1.0, 2.0, 100.0), cell(2.0, 1.0, 300.0)]
    assert best_constants(cells) == (100.0, 300.0, 1.0)
    assert loss(cells, 50.0) == pytest.approx(4 / 3)  # the second takes the slower fresh weight
    assert loss(cells, 500.0) == pytest.approx(5 / 3)
    assert best_constants([cell(1.0, 2.0, 100.0)]) == (100.0, float("inf"), 1.0)


def test_first_round_warms_up_and_is_not_counted() -> None:
    def turns(*with_loras: float) -> Turns:
        return Turns({0: [9.0, 1.0, 1.0], 2: list(with_loras)}, {0: [9.0, 0.0, 0.0], 2: [9.0, 0.5, 0.5]})

    found = {"stock": turns(9.0, 1.0, 1.0), "shared": turns(9.0, 1.02, 1.04)}
    picture = Path(__file__).parents[2] / "bench" / "results"
    png = next(picture.rglob("*.png")).read_bytes()
    for one in found.values():
        one.pictures = {0: png, 2: png}
    value = {figure.figure: figure.value for figure in figures(found, (0, 2))}
    assert value["server, 2 LoRAs: step over none, shared"] == pytest.approx(3.0)
    assert value["server, switch to 2 LoRAs: first sampling over a later one, stock"] == 0.5


def test_psnr_of_one_level_is_48_db() -> None:
    dark = np.zeros((2, 2, 3))
    assert psnr(dark, dark) == 999
    assert psnr(dark, dark + 1) == pytest.approx(48.13, abs=0.01)


def test_steps_of_the_part_end_in_eight_minutes() -> None:
    assert sum(step.expected_s for step in lora.PART.steps) < 480
