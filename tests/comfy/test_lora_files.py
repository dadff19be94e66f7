"""LoRA files by other people's code, through ComfyUI's own loaders, on a shared model: right, complete, and gone again.

The reference is stock ComfyUI with the same checkpoint loaded locally in float32 and the file merged into its weights.
One process an architecture looks at all files (lora_check.py); the tests judge what it saw.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.comfy.conftest import Host, LoraFiles
from tests.comfy.lora_files import FILES, STACKS
from tests.comfy.test_packs import run

pytestmark = [pytest.mark.comfy, pytest.mark.timeout(700)]

LAYER = 1e-5
"""Relative difference that a layer may have from W + dW in float32."""
END_TO_END = 1e-4
"""Relative difference of a whole pass: a dozen layers, each of which may carry on what those before it rounded."""
NORMS_IN_HALF = 5e-4
"""The same for a file with norms of a text encoder: that is stored in fp16, and stock rounds patched norms to it."""
CHANGE = 1e-3
"""What every file changes in every layer it touches, at least: differences are told from effects."""
RUN_TIMEOUT_S = 600

STACK = "a stack"
CASES = [(arch, name) for arch, files in FILES.items() for name in [*files, STACK]]

Report = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def report(host: Host, models: Path, lora_files: LoraFiles) -> Callable[[str], Report]:
    """Architecture -> {file: what lora_check saw of it}; the entry without a name is about the shared bytes."""
    made: dict[str, Report] = {}

    def of(arch: str) -> Report:
        if arch not in made:
            made[arch] = _look(host, models, lora_files, arch)
        return made[arch]

    return of


def _look(host: Host, models: Path, lora_files: LoraFiles, arch: str) -> Report:
    files = {name: str(file.path) for name, file in lora_files.of(arch).items()}
    stacks = {name: [path] for name, path in files.items()} | {STACK: [files[name] for name in STACKS[arch]]}
    check, checkpoint = str(Path(__file__).with_name("lora_check.py")), str(lora_files.checkpoint(arch))
    body = f"import runpy\nrunpy.run_path({check!r})['main']({checkpoint!r}, {stacks!r})"
    printed = [json.loads(line) for line in run(host, models, body, RUN_TIMEOUT_S).splitlines() if line[:1] == "{"]
    return {line["file"]: line for line in printed}


def _seen(report: Callable[[str], Report], arch: str, name: str) -> dict[str, Any]:
    line = report(arch)[name]
    assert not line["error"], line["error"]
    return line


def _is_norm_in_half(line: dict[str, Any]) -> bool:
    return "text_model" in line["worst"] and "norm" in line["worst"]


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_nothing_in_the_file_is_passed_over(
    arch: str, name: str, report: Callable[[str], Report], lora_files: LoraFiles
) -> None:
    line, files = _seen(report, arch, name), lora_files.of(arch)
    assert line["complaints"] == []
    assert line["patches"] == sum(files[part].patches for part in (STACKS[arch] if name == STACK else [name])) > 0


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_every_layer_is_stocks_merged_one(arch: str, name: str, report: Callable[[str], Report]) -> None:
    line = _seen(report, arch, name)
    assert line["least_change"] >= CHANGE, "a file that changes nothing proves nothing"
    assert line["worst_layer"] <= (NORMS_IN_HALF if _is_norm_in_half(line) else LAYER), line["worst"]


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_output_of_the_whole_is_stocks(arch: str, name: str, report: Callable[[str], Report]) -> None:
    line = _seen(report, arch, name)
    assert line["end_to_end"] <= (NORMS_IN_HALF if _is_norm_in_half(line) else END_TO_END)


@pytest.mark.parametrize(("arch", "name"), CASES)
def test_without_the_file_the_next_output_is_bit_identical(
    arch: str, name: str, report: Callable[[str], Report]
) -> None:
    assert _seen(report, arch, name)["restored"]


@pytest.mark.parametrize("arch", FILES)
def test_only_one_of_the_two_models_was_shared(arch: str, report: Callable[[str], Report]) -> None:
    assert report(arch)[""]["one is shared"], "a copy was compared with itself"


@pytest.mark.parametrize("arch", FILES)
def test_no_file_changed_a_shared_byte(arch: str, report: Callable[[str], Report]) -> None:
    assert report(arch)[""]["shared bytes unchanged"]
