"""The contract's fixtures, over the real driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.contracts import rungs
from tests.contracts.fixtures import actors, opener, owner, part, rung, second, segment  # noqa: F401
from tests.contracts.remote import RemoteSegment
from tests.gpu.programs import Program


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    rungs.parametrize(metafunc, rungs.GPU)


@pytest.fixture
def run() -> Iterator[Callable[..., Program]]:
    """Starts a client with torch: what it does (see tests/gpu/client.py), a segment, variables of its environment."""
    with ExitStack() as stack:

        def start(what: str, segment: RemoteSegment, **environment: str) -> Program:
            return stack.enter_context(Program(what, segment, environment))

        yield start
