from __future__ import annotations

import pytest

from tests.contracts import rungs
from tests.contracts.fixtures import actors, opener, owner, part, rung, second, segment  # noqa: F401


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rungs.parametrize(metafunc, rungs.EVERYWHERE)
