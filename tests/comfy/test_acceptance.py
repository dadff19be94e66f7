"""The user's eight tests in their short form: ``make acceptance`` with few renders of a tiny model, a case a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.acceptance.registry import BY_NAME
from tests.comfy.conftest import ROOT
from tests.tiers import comfy_checkout

pytestmark = [pytest.mark.comfy, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def record(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of one run in a process of its own; it finds the session's checkpoint where benchmarks keep theirs."""
    kept, out = tmp_path_factory.mktemp("kept"), tmp_path_factory.mktemp("acceptance")
    (kept / "checkpoints").mkdir()
    (kept / "checkpoints" / "sd15-tiny-fp16.safetensors").symlink_to(models / "checkpoints" / "sd15-tiny.safetensors")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("LUNASHM_")}
    command = [sys.executable, "-m", "bench.acceptance", "--short", "--json", "--device", "cpu", "--out", str(out)]
    done = subprocess.run(
        [*command, "--comfyui", str(comfy_checkout())], cwd=ROOT, capture_output=True, text=True, check=False,
        env=clean | {"LUNASHM_BENCH_MODELS": str(kept)},
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["passed"] == (done.returncode == 0), done.stderr
    assert len(list(out.glob("acceptance-short-*.md"))) == 1
    return found


@pytest.mark.parametrize("name", BY_NAME)
def test_short_form_passes(record: dict[str, Any], name: str) -> None:
    test = next(test for test in record["tests"] if test["test"] == name)
    reasons = "\n".join([test["line"], *test["notes"]])
    assert test["status"] == "PASS", reasons
    assert len(test["claims"]) > 5 and len(test["line"]) > 50, reasons
