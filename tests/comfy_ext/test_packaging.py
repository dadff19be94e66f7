"""The pack as other people's tools see it: its metadata, its requirements, and what a wheel brings along."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

import comfy_ext
import lunashm
from lunashm.cli.checkout import NODE, SUPPORTED_FROM

ROOT = Path(__file__).parents[2]
PACK = ROOT / "comfy_ext"
ASSETS = ("web", "locales", "example_workflows")


def toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def test_all_versions_agree():
    project = toml(PACK / "pyproject.toml")["project"]
    required = f"lunashm=={lunashm.__version__}"
    assert comfy_ext.__version__ == project["version"] == lunashm.__version__
    assert project["dependencies"] == (PACK / "requirements.txt").read_text().split() == [required]
    assert f"## {lunashm.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_pack_and_the_package_say_the_same_of_themselves():
    pack, package = toml(PACK / "pyproject.toml"), toml(ROOT / "pyproject.toml")
    assert pack["project"]["name"] == NODE, "one folder in custom_nodes, whoever installs it"
    for key in ("license", "requires-python"):
        assert pack["project"][key] == package["project"][key]
    assert pack["tool"]["comfy"]["requires-comfyui"] == f">={'.'.join(map(str, SUPPORTED_FROM))}"
    assert "comfy" not in package["tool"], "the registry reads the pack's own file"


def test_comfyui_reads_the_metadata_of_the_pack():
    """The keys that ComfyUI's comfy_config and the registry's client know; another spelling is silently ignored."""
    pack = toml(PACK / "pyproject.toml")
    known = {"PublisherId", "DisplayName", "Icon", "Banner", "Models", "includes", "web", "requires-comfyui", "version"}
    assert set(pack["tool"]["comfy"]) <= known
    assert {"PublisherId", "DisplayName"} <= set(pack["tool"]["comfy"])
    assert all(part.isdigit() for part in pack["project"]["version"].split(".")), "the registry wants X.Y.Z"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of the tree: setuptools leaves its traces beside the source."""
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    for name in ("lunashm", "comfy_ext"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", place, tree]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = place.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        return set(archive.namelist())


def test_a_wheel_has_all_of_the_pack(wheel: set[str]):
    """So that `lunashm comfy install` from a wheel links what it links from a checkout."""
    files = [path for path in PACK.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {str(path.relative_to(ROOT)) for path in files} <= wheel
    for folder in ASSETS:
        assert any(name.startswith(f"comfy_ext/{folder}/") for name in wheel), f"{folder}/ is empty"


def test_a_wheel_has_all_of_the_package(wheel: set[str]):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "lunashm").rglob("*.py")}
    assert modules <= wheel
    assert "lunashm/py.typed" in wheel
