"""What tests of benchmarks have in common."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all steps of the GPU suite, as there: checkpoints are made once."""
    return tmp_path_factory.mktemp("scratch")
