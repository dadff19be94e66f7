"""A host in a thread that lends real shared memory, and everything a client leaves is checked."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from lunashm.client import Session
from lunashm.client import session as session_module
from lunashm.memory import ON_CPU, rung_for
from tests import checkpoints
from tests.hosting import Hosting


@pytest.fixture(params=ON_CPU)
def hosting(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Hosting]:
    """With memory that has a name, and with memory whose descriptors have to be handed over."""
    hosting = Hosting(tmp_path, rung=rung_for(request.param, "cpu"))
    hosting.start()
    yield hosting
    gc.collect()
    close_sessions()
    hosting.stop()


@pytest.fixture
def path(hosting: Hosting) -> Path:
    """A small checkpoint below the host's root."""
    path = hosting.root / "m.safetensors"
    checkpoints.write(path)
    return path


@pytest.fixture
def session(hosting: Hosting) -> Iterator[Session]:
    session = Session(hosting.endpoint, kind="test", label="unit")
    yield session
    gc.collect()
    session.close()


@pytest.fixture(autouse=True)
def sessions_end_with_their_test() -> Iterator[None]:
    """What attach() opens lives as long as the process, which is one process for all tests."""
    yield
    close_sessions()


def close_sessions() -> None:
    for session in session_module._sessions.values():
        session.close()
    session_module._sessions.clear()
