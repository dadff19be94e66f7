"""What the demo decides and draws; that it runs is shown by running it."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from bench import demo_comfy, demo_lora, demo_report
from bench.demo_model import PRESETS, DemoError, choose
from bench.demo_report import Comparison, Memory
from lunashm.client import lora_file
from lunashm.client.lora_names import match

GB = 10**9
PLENTY = 1000 * GB


def test_the_largest_model_that_fits_is_taken():
    assert choose(PLENTY, PLENTY, PLENTY, clients=4) is PRESETS[0]
    assert choose(64 << 20, PLENTY, PLENTY, clients=4).name == "tiny"
    assert choose(PLENTY, 6 * GB, PLENTY, clients=4).name == "small"
    assert choose(PLENTY, PLENTY, GB // 2, clients=4).name == "small"


def test_more_clients_need_more_ram():
    assert choose(PLENTY, 15 * GB, PLENTY, clients=4).name == "large"
    assert choose(PLENTY, 15 * GB, PLENTY, clients=8).name == "medium"


def test_a_machine_too_small_is_told_what_is_missing():
    with pytest.raises(DemoError, match="44 MB of /dev/shm"):
        choose(20 << 20, PLENTY, PLENTY, clients=4)


def test_a_checkout_that_is_named_must_be_one(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LUNASHM_COMFYUI", raising=False)
    assert demo_comfy.checkout() is None
    monkeypatch.setenv("LUNASHM_COMFYUI", str(tmp_path))
    with pytest.raises(DemoError, match="no ComfyUI checkout"):
        demo_comfy.checkout()
    (tmp_path / "comfy").mkdir()
    for name in ("main.py", "comfy/sd.py"):
        (tmp_path / name).touch()
    assert demo_comfy.checkout() == tmp_path.resolve()


@pytest.fixture
def comparison():
    private = [Memory(f"client {n}", 2 * GB, 2 * GB) for n in (1, 2)]
    shared = [*(Memory(f"client {n}", 1_250_000_000, GB // 2) for n in (1, 2)), Memory("host", GB // 10, GB // 10)]
    times = {"private": [2.0, 2.5], "shared": [1.0, 1.0]}
    return Comparison("two clients", 1_500_000_000, private, shared, times, identical=2, outputs=2)


def test_table_picture_and_json_agree(comparison, tmp_path):
    screen = Console(file=io.StringIO(), width=120)
    demo_report.print_table(comparison, screen)
    assert "2,600 MB" in screen.file.getvalue()
    assert "35%" in screen.file.getvalue()
    demo_report.draw([comparison, comparison], tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    demo_report.write([comparison], tmp_path / "demo.json", comfy=None)
    value = json.loads((tmp_path / "demo.json").read_text())
    figures = {figure["figure"]: figure["value"] for figure in value["figures"]}
    assert figures["memory with sharing"] == 2_600_000_000
    assert figures["saved"] == pytest.approx(0.35)
    assert value["met"] is True
    assert {"hardware", "versions", "samples", "comparisons"} <= value.keys()


def test_loras_are_shown_beside_their_clients_and_counted(comparison, tmp_path):
    found = dataclasses.replace(comparison, loras=["kohya", "PEFT"], distinct=2, checksums=["ab"] * 4)
    assert found.faults == []
    screen = Console(file=io.StringIO(), width=120)
    demo_report.print_table(found, screen)
    rows = [line.split() for line in screen.file.getvalue().splitlines() if line.startswith("│ ")]
    assert [row[1:5] for row in rows[:2]] == [["client", "1", "│", "kohya"], ["client", "2", "│", "PEFT"]]
    demo_report.write([found], tmp_path / "demo.json", comfy=None)
    assert json.loads((tmp_path / "demo.json").read_text())["met"] is True


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"identical": 1}, "differ between shared and private"),
        ({"distinct": 1}, "1 outputs are alike"),
        ({"checksums": ["ab", "ab", "cd", "ab"]}, "shared bytes changed"),
    ],
)
def test_what_must_never_be_is_a_fault(comparison, tmp_path, change, fault):
    fine = {"loras": ["kohya", "PEFT"], "distinct": 2, "checksums": ["ab"] * 4}
    found = dataclasses.replace(comparison, **fine | change)
    assert [fault in said for said in found.faults] == [True]
    demo_report.write([found], tmp_path / "demo.json", comfy=None)
    assert json.loads((tmp_path / "demo.json").read_text())["met"] is False


def test_every_client_gets_a_lora_of_its_own_that_fits_the_model(tmp_path):
    unet = torch.nn.ModuleDict({"conv1": torch.nn.Conv2d(4, 6, 3), "attn": torch.nn.Linear(6, 6)})
    unet["norm"] = torch.nn.LayerNorm(6)
    save_file(unet.state_dict(), tmp_path / "m.safetensors")
    seen = []
    for number in range(4):
        out = demo_lora.make(tmp_path / "m.safetensors", tmp_path, number)
        assert out == demo_lora.path_of(tmp_path, number)
        file = lora_file.read(str(out))
        matches = match(file.layers, [unet])
        assert sorted(layer.name for layer in matches.layers.values()) == ["attn", "conv1"]
        assert matches.unmatched == file.unknown == ()
        assert {factors.rank for factors in file.layers.values()} == {demo_lora.RANK}
        seen.append(next(factors.up for name, factors in file.layers.items() if "attn" in name))
    assert not any(torch.equal(seen[0], other) for other in seen[1:])
    assert {demo_lora.style_of(number) for number in range(4)} == {"kohya", "diffusers", "PEFT"}
