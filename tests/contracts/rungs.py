"""What is tested where: each rung, the machine it is tested on, and what it must keep. Imports no CUDA."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).parents[2]
PYTHON_PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
"""Of the processes that tests start: packages may come in by it, too."""

_T = TypeVar("_T", bound=Callable[..., Any])


@dataclass(frozen=True)
class Entry:
    """``device``: cpu, or first for the first GPU. ``read_only``: a write through a mapping kills the writer.

    ``descriptors``: memory without a name, so that a descriptor travels beside the handle. ``standin``: the driver is
    the one of tests/standin. ``in_process``: the fake of other tests, which knows nothing of processes.
    """

    rung: str
    device: str
    outlives_host: bool
    read_only: bool
    descriptors: bool
    standin: bool = False
    in_process: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    def environment(self) -> dict[str, str]:
        """Of this rung's processes."""
        if self.standin:
            from tests.standin import build

            return build.environment()
        return os.environ | {"PYTHONPATH": PYTHON_PATH}


def _cuda(standin: bool) -> list[Entry]:
    return [
        Entry("cuda-vmm", "first", outlives_host=True, read_only=True, descriptors=True, standin=standin),
        Entry("cuda-ipc", "first", outlives_host=False, read_only=False, descriptors=False, standin=standin),
    ]


CPU = [
    Entry("posix", "cpu", outlives_host=True, read_only=True, descriptors=False),
    Entry("memfd", "cpu", outlives_host=True, read_only=True, descriptors=True),
]
FAKE = Entry("heap", "cpu", outlives_host=False, read_only=True, descriptors=False, in_process=True)
STANDIN = _cuda(standin=True)
GPU = _cuda(standin=False)

EVERYWHERE = [*CPU, *STANDIN, FAKE]
"""What needs no GPU."""


def only(condition: Callable[[Entry], bool]) -> Callable[[_T], _T]:
    """For a test of what only some rungs promise."""

    def mark(test: _T) -> _T:
        test.only = condition  # type: ignore[attr-defined]
        return test

    return mark


in_processes = only(lambda entry: not entry.in_process)


def parametrize(metafunc: pytest.Metafunc, entries: list[Entry]) -> None:
    """A test that has to do with a rung runs once for each of ``entries`` that it is meant for."""
    if "entry" in metafunc.fixturenames:
        wanted = getattr(metafunc.function, "only", lambda entry: True)
        chosen = [entry for entry in entries if wanted(entry)]
        metafunc.parametrize("entry", chosen, ids=[entry.rung for entry in chosen], scope="function")
