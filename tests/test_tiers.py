from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiers


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LUNASHM_COMFYUI", str(tmp_path / "ComfyUI"))
    return tmp_path / "ComfyUI"


def test_core_runs_everywhere() -> None:
    assert tiers.why_not("core") is None


def test_comfy_runs_where_the_variable_names_a_checkout(checkout: Path) -> None:
    checkout.mkdir()
    assert tiers.why_not("comfy") == f"no checkout at {checkout} (LUNASHM_COMFYUI names another)"
    (checkout / "main.py").touch()
    assert tiers.why_not("comfy") is None
    assert tiers.against("comfy") == f" against {checkout} of unknown version"
    (checkout / "comfyui_version.py").write_text('# generated\n__version__ = "0.28.0"\n')
    assert tiers.against("comfy") == f" against {checkout} 0.28.0"


def test_comfy_on_a_stand_in_gpu_needs_a_checkout_and_no_gpu(checkout: Path) -> None:
    assert tiers.why_not("comfy_gpu") == f"no checkout at {checkout} (LUNASHM_COMFYUI names another)"
    checkout.mkdir()
    (checkout / "main.py").touch()
    assert tiers.why_not("comfy_gpu") is None
    assert tiers.against("comfy_gpu") == f" against {checkout} of unknown version"


def test_comfy_is_looked_for_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LUNASHM_COMFYUI", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tiers.comfy_checkout() is None
    (tmp_path / "ComfyUI").mkdir()
    (tmp_path / "ComfyUI" / "main.py").touch()
    assert tiers.comfy_checkout() == tmp_path / "ComfyUI"
