"""The LoRA nodes in a ComfyUI without the lunashm package: what they make is what the stock nodes make, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.comfy.conftest import ROOT
from tests.tiers import comfy_checkout

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def printed(models: Path) -> str:
    path = os.pathsep.join([str(comfy_checkout()), str(ROOT)])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("gateway_check.py")), str(models)],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize("seen", ["latents 13", "outputs", "explained"])
def test_without_the_package_everything_is_as_the_stock_nodes_make_it(seen: str, printed: str) -> None:
    assert seen in printed.splitlines(), printed
