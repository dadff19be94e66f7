"""What bench.lora computes from its timings, and one run of it with tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import lora
from bench.lora_figures import Measured, Memory, Pair, Switch, branch_flops, counted, difference, figures, ratios
from tests.tiers import comfy_checkout

QUIET, BUSY = 0.0, 1.0


def pair(way: str, depth: int, number: int, base_s: float, lora_s: float, others: float = QUIET) -> Pair:
    return Pair(way, depth, number, base_s, lora_s, others)


def test_floor_of_one_square_layer_is_two_rank_over_width() -> None:
    tokens, width, rank = 100, 512, 16
    measured = Measured("one layer", rank, [(tokens, width, width)], step_flops=2 * tokens * width * width)
    assert measured.floor(4) == pytest.approx(2 * 4 * rank / width)


def test_branch_counts_each_call_with_its_own_tokens() -> None:
    both = [(10, 4, 8), (3, 5, 7)]
    assert branch_flops(both, 2) == 2 * 2 * (10 * 12 + 3 * 12)


def test_overhead_is_the_median_of_ratios_of_pairs_not_a_ratio_of_medians() -> None:
    pairs = [pair("ours", 1, number, base, base * 1.1) for number, base in enumerate((1.0, 2.0, 8.0))]
    measured = Measured("drifting", 16, pairs=[*pairs, pair("ours", 1, 3, 1.0, 9.0, BUSY)])
    assert measured.overhead("ours", 1) == pytest.approx(0.1)


def test_disturbed_samples_count_only_where_too_few_are_quiet() -> None:
    quiet = [pair("ours", 1, number, 1.0, 1.1) for number in range(3)]
    busy = pair("ours", 1, 3, 1.0, 5.0, BUSY)
    assert counted([*quiet, busy]) == quiet
    assert counted([*quiet[:2], busy]) == [*quiet[:2], busy]


def test_ways_are_compared_within_a_round() -> None:
    ours = [pair("ours", 1, number, 1.0, seconds) for number, seconds in enumerate((1.0, 2.0, 4.0, 8.0))]
    theirs = [pair("bypass", 1, number, 1.0, 2 * one.lora_s) for number, one in reversed(list(enumerate(ours)))]
    assert ratios(ours, theirs) == [0.5] * 4
    theirs[0] = pair("bypass", 1, 3, 1.0, 99.0, BUSY)
    assert ratios(ours, theirs) == [0.5] * 3


def test_difference_is_relative_to_the_reference() -> None:
    assert difference([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)


def test_targets_are_set_from_rank_sum_64_on_and_for_every_depth_against_bypass() -> None:
    ways = {"ours": 1.1, "merge": 1.0, "bypass": 1.3}
    measured = Measured("made up", 16, [(1, 64, 64)], step_flops=2 * 64 * 64 * 20)
    measured.pairs = [pair(way, depth, 0, 1.0, seconds) for way, seconds in ways.items() for depth in (1, 4)]
    measured.switches = [Switch(way, 0, seconds, 1.2, 1.0, QUIET) for way, seconds in ways.items()]
    measured.memory = {way: Memory(110, 120, 100) for way in ways}
    found = {figure.figure: figure for figure in figures(measured)}
    assert found["made up, 1 LoRA (rank sum 16): ours, overhead / floor"].target is None
    assert found["made up, 4 LoRAs (rank sum 64): ours, overhead / floor"].met is True
    assert found["made up, 1 LoRA (rank sum 16): step, ours / stock bypass, median of pairs"].met is True
    assert found["made up, switch of a stack of 2: stock merge / ours, median of pairs"].met is False
    assert found["made up, private memory of a stack of 2: ours, counted by the patcher / factors"].met is True


@pytest.mark.comfy
def test_a_run_measures_every_way_and_all_compute_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    comfy = comfy_checkout()
    if comfy is None or "def load_bypass_lora_for_models" not in (comfy / "comfy" / "sd.py").read_text():
        pytest.skip("this ComfyUI has no bypass to compare with")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other stall tiny steps on a busy machine
    monkeypatch.setenv("LUNASHM_BENCH_MODELS", str(tmp_path / "models"))
    options = "--arch flux-tiny --size 64 --rank 4 --depths 1,2 --rounds 1 --json"
    lora.main([*options.split(), "--comfy", str(comfy), "--save", str(tmp_path / "out")])
    report = json.loads(capsys.readouterr().out)
    values = {figure["figure"]: figure["value"] for figure in report["figures"]}
    assert values["flux-tiny, 2 LoRAs: output of ours against stock merge, relative"] < 1e-5
    assert values["flux-tiny, 2 LoRAs: output of bypass against stock merge, relative"] < 1e-5
    assert values["flux-tiny, private memory of a stack of 2: ours, counted by the patcher / factors"] <= 1.2
    assert values["flux-tiny, 2 LoRAs (rank sum 8): arithmetic floor"] > 0
    for way in ("ours", "merge", "bypass"):
        assert report["samples"][f"flux-tiny, {way}, 2 LoRAs: step, s"]
    assert len(list((tmp_path / "out").glob("lora-*.png"))) == 1
