"""What the demo decides and draws; that it runs is shown by running it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from bench import demo_comfy, demo_report
from bench.demo_model import PRESETS, DemoError, choose
from bench.demo_report import Comparison, Memory

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
